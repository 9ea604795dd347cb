"""``fastclip eval robustness``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from fastclip.cli.embedding import embedder_of
from fastclip.cli.evaluate.zeroshot import add_templates_option, percent
from fastclip.cli.printing import say

if TYPE_CHECKING:
    from fastclip.evaluation.features import FeatureStore

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
    for name, (option, told) in _OPTIONS.items():
        parser.add_argument(option, dest=name, metavar="DIR", help=told)
    add_templates_option(parser, default="openai")
    parser.add_argument("--plot", metavar="FILE", help="PNG: ImageNet against the mean of the others; needs --imagenet")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from fastclip.data.prompts import read_templates
    from fastclip.evaluation import robustness
    from fastclip.evaluation.results import write_results

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
    if args.output:
        write_results(args.output, results)
    if args.plot:
        robustness.plot(args.plot, robustness.accuracies(results), name=embedder.name)
    for store in stores:
        store.clear()


def _print(results: list[dict[str, Any]]) -> None:
    from fastclip.evaluation.published import ZERO_SHOT
    from fastclip.evaluation.results import table
    from fastclip.evaluation.robustness import SETS, accuracies, compared_sets, mean_drop

    rows = []
    for one in results:
        name, metrics = one["dataset"], one["metrics"]
        own = [percent(metrics["acc1"]), percent(metrics["acc5"])]
        known = [x.get(name) for x in ZERO_SHOT.values()]
        rows.append([SETS[name].title, one["classes"], one["images"], *own, *known])
    found = accuracies(results)
    sets = compared_sets(found)
    drops = [mean_drop(one, sets) for one in (found, *ZERO_SHOT.values())]
    if drops[0] is not None:
        rows.append(["mean drop", None, None, drops[0], None, *drops[1:]])
    say(table(["", "classes", "images", "acc1", "acc5", *ZERO_SHOT], rows))
    if drops[0] is not None:
        say(f"mean drop: points of top-1 from ImageNet to the mean of {', '.join(SETS[name].title for name in sets)}")
