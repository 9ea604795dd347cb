"""``fastclip eval probe``: a linear probe of the image features."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from fastclip.cli.embedding import embedder_of
from fastclip.cli.evaluate.zeroshot import percent
from fastclip.cli.help import describe
from fastclip.cli.pictures import add_labelled_data, add_reference
from fastclip.cli.printing import say

if TYPE_CHECKING:
    from fastclip.embedding.features import FeatureStore

__all__ = ["add"]


def add(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Fit a logistic regression on image features with L-BFGS, and sweep its L2 penalty on validation data, as in "
        "the paper of CLIP.",
        "fastclip eval probe --checkpoint runs/digits --data digits --test-data digits",
        "fastclip eval probe --checkpoint runs/b32 --data food101/train --test-data food101/test --output probe.json",
    )
    add_labelled_data(parser)
    parser.add_argument(
        "--val-data",
        metavar="SPEC",
        help="images with the same classes, on which the penalty is chosen (default: a fifth of --data)",
    )
    parser.add_argument(
        "--test-data",
        required=True,
        metavar="SPEC",
        help="images with the same classes, on which results are reported; `digits` means the fifth of the digits that "
        "--data digits leaves out",
    )
    parser.add_argument(
        "--features",
        choices=("tower", "embedding"),
        default="tower",
        help="features to fit: the output of the tower before its projection, as in the paper, or the unit vectors of "
        "the embedding, as in CLIP_benchmark",
    )
    parser.add_argument(
        "--metric",
        choices=("acc1", "mean_per_class_recall"),
        help="metric by which the penalty is chosen, and which is shown beside --reference (default: the metric of the "
        "published results, or acc1 if there are none)",
    )
    add_reference(parser, "--test-data")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="random seed for the split of --data, if there is no --val-data",
    )
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
    say(f"lambda {probe.metrics['weight_decay']:.3g}, the best of {len(probe.sweep)} values")
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
