"""``fastclip eval probe``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from fastclip.cli.embedding import embedder_of
from fastclip.cli.evaluate.zeroshot import percent
from fastclip.cli.printing import say

if TYPE_CHECKING:
    from fastclip.embedding.features import FeatureStore

__all__ = ["add"]


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Logistic regression on image features (L-BFGS), its L2 penalty swept on a validation split, as CLIP's paper."
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="SPEC",
        help="pictures with classes to fit: class folders, digits, ...",
    )
    parser.add_argument("--val-data", metavar="SPEC", help="to choose the penalty on; default: a fifth of --data")
    parser.add_argument("--test-data", required=True, metavar="SPEC", help="to report on; digits is the held-out fifth")
    parser.add_argument(
        "--features",
        choices=("tower", "embedding"),
        default="tower",
        help="tower: before the projection, as the paper; embedding: unit vectors, as CLIP_benchmark (tower)",
    )
    parser.add_argument(
        "--metric",
        choices=("acc1", "mean_per_class_recall"),
        help="to choose the penalty by, and to show beside --reference's; default: the reference's own, else acc1",
    )
    parser.add_argument("--reference", metavar="NAME", help="published numbers to show: food101, cifar10, imagenet ...")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the split (0)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], list[FeatureStore]]:
    from fastclip.data.spec import open_labelled
    from fastclip.evaluation.probe import linear_probe
    from fastclip.evaluation.published import MEAN_PER_CLASS, top1, top1_dataset
    from fastclip.evaluation.results import result, table

    reference = args.reference or top1_dataset(args.test_data)
    published = top1(reference) if reference is not None else {}
    metric: Any = args.metric or ("mean_per_class_recall" if reference in MEAN_PER_CLASS else "acc1")
    train, test = open_labelled(args.data, held_out=False), open_labelled(args.test_data)
    val = open_labelled(args.val_data) if args.val_data else None
    embedder = embedder_of(args)
    options = {name: getattr(args, name) for name in ("features", "seed", "batch_size", "workers")}
    stores: list[FeatureStore] = []
    probe = linear_probe(embedder, train, test, val=val, metric=metric, stores=stores, progress=True, **options)
    names = ("acc1", "acc5", "mean_per_class_recall")
    values = (percent(probe.metrics[f"lp_{name}"]) for name in names)
    say(table([args.test_data, *names], [["linear probe", *values]]))
    say(f"lambda {probe.metrics['weight_decay']:.3g}, of {len(probe.sweep)} tried")
    if reference is not None:
        rows = {"linear probe": 100 * probe.metrics[f"lp_{metric}"], **published}
        say("\n" + table([reference, metric], list(rows.items())))
    results = result(
        dataset=args.reference or args.test_data,
        task="linear_probe",
        model=embedder.name,
        pretrained=args.checkpoint,
        metrics=probe.metrics,
        features=args.features,
        metric=metric,
        train=args.data,
        test=args.test_data,
        val=args.val_data,
        sweep=[{"weight_decay": penalty, metric: value} for penalty, value in probe.sweep],
        sweep_unconverged=probe.unconverged,
        converged=probe.converged,
    )
    return results, stores
