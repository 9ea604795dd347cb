"""``fastclip eval robustness``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from fastclip.cli.embedding import embedder_of
from fastclip.cli.evaluate.zeroshot import add_templates_option, percent
from fastclip.cli.printing import say

if TYPE_CHECKING:
    from fastclip.embedding.features import FeatureStore

__all__ = ["add"]

_OPTIONS = {  # of the data sets, by their names in fastclip.evaluation.robustness.SETS
    "imagenet1k": ("--imagenet", "the validation pictures, val/n01440764/ ..."),
    "imagenetv2": ("--imagenet-v2", "matched frequency, folders 0 to 999"),
    "imagenet-r": ("--imagenet-r", "renditions, 200 classes"),
    "imagenet-a": ("--imagenet-a", "natural adversarial examples, 200 classes"),
    "imagenet_sketch": ("--imagenet-sketch", "black and white sketches"),
}


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Zero-shot top-1 on ImageNet and its variants, each a folder of class folders called by WordNet id (of "
        "ImageNet-V2 by class number), beside published results. -R and -A are classified among their own 200 classes."
    )
    for name, (option, pictures) in _OPTIONS.items():
        parser.add_argument(option, dest=name, metavar="DIR", help=pictures)
    add_templates_option(parser, default="openai")
    parser.add_argument("--plot", metavar="FILE", help="PNG: ImageNet against the mean of the others; needs --imagenet")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[FeatureStore]]:
    from fastclip.data.classes.prompts import read_templates
    from fastclip.evaluation import robustness

    folders = {name: folder for name in _OPTIONS if (folder := getattr(args, name)) is not None}
    if not folders:
        raise ValueError(f"name the folder of a data set: {', '.join(option for option, _ in _OPTIONS.values())}")
    if args.plot and ("imagenet1k" not in folders or len(folders) < 2):
        raise ValueError("--plot needs --imagenet and at least one other set")
    stores: list[FeatureStore] = []
    results = robustness.robustness(
        embedder := embedder_of(args),
        folders,
        templates=read_templates(args.templates or "openai"),
        pretrained=args.checkpoint,
        batch_size=args.batch_size,
        workers=args.workers,
        progress=True,
        stores=stores,
    )
    _print(results)
    if args.plot:
        robustness.plot(args.plot, robustness.accuracies(results), name=embedder.name)
    return results, stores


def _print(results: list[dict[str, Any]]) -> None:
    from fastclip.evaluation.published import ZERO_SHOT
    from fastclip.evaluation.results import table
    from fastclip.evaluation.robustness import SETS, accuracies, compared_sets, mean_drop

    rows = []
    for result in results:
        name, metrics = result["dataset"], result["metrics"]
        published = [by_set.get(name) for by_set in ZERO_SHOT.values()]
        top = [percent(metrics["acc1"]), percent(metrics["acc5"])]
        rows.append([SETS[name].title, result["classes"], result["images"], *top, *published])
    top1 = accuracies(results)
    sets = compared_sets(top1)
    drop, *published = (mean_drop(by_set, sets) for by_set in (top1, *ZERO_SHOT.values()))
    if drop is not None:
        rows.append(["mean drop", None, None, drop, None, *published])
    say(table(["", "classes", "images", "acc1", "acc5", *ZERO_SHOT], rows))
    if drop is not None:
        say(f"mean drop: points of top-1 from ImageNet to the mean of {', '.join(SETS[name].title for name in sets)}")
