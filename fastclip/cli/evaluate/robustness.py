"""``fastclip eval robustness``: ImageNet and its variants with one zero-shot classifier."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from fastclip.cli.embedding import embedder_of
from fastclip.cli.evaluate.zeroshot import add_templates_option, percent
from fastclip.cli.help import describe
from fastclip.cli.printing import say

if TYPE_CHECKING:
    from fastclip.embedding.features import FeatureStore

__all__ = ["add"]

_OPTIONS = {  # keys are the names of the datasets in fastclip.evaluation.robustness.SETS
    "imagenet1k": ("--imagenet", "ImageNet's validation images, as in val/n01440764/"),
    "imagenetv2": ("--imagenet-v2", "ImageNet-V2, matched frequency, with subfolders 0 to 999"),
    "imagenet-r": ("--imagenet-r", "ImageNet-R, renditions in 200 classes"),
    "imagenet-a": ("--imagenet-a", "ImageNet-A, natural adversarial examples in 200 classes"),
    "imagenet_sketch": ("--imagenet-sketch", "ImageNet-Sketch, black and white sketches"),
}


def add(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Measure zero-shot top-1 accuracy on ImageNet and its variants, and print it beside published results. Give at "
        "least one of the five folders. Each has one subfolder per class, named by WordNet id, or by class number for "
        "ImageNet-V2. ImageNet-R and ImageNet-A are classified among their own 200 classes.",
        "fastclip eval robustness --checkpoint runs/b32 --imagenet imagenet/val --imagenet-r imagenet-r",
        "fastclip eval robustness --checkpoint ViT-B-32.pt --model ViT-B-32 --imagenet imagenet/val \\\n"
        "    --imagenet-v2 imagenetv2 --plot robustness.png --output robustness.json",
    )
    for name, (option, images) in _OPTIONS.items():
        parser.add_argument(option, dest=name, metavar="DIR", help=f"folder of {images} (default: not evaluated)")
    add_templates_option(parser, default="openai")
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="PNG file that plots ImageNet against the mean of the other sets; needs --imagenet (default: no file)",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[FeatureStore]]:
    from fastclip.data.classes.prompts import read_templates
    from fastclip.evaluation import robustness

    folders = {name: folder for name in _OPTIONS if (folder := getattr(args, name)) is not None}
    if not folders:
        raise ValueError(
            f"no dataset to evaluate: give at least one of {', '.join(option for option, _ in _OPTIONS.values())}"
        )
    if args.plot and ("imagenet1k" not in folders or len(folders) < 2):
        raise ValueError("--plot needs --imagenet and at least one other dataset")
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
        titles = ", ".join(SETS[name].title for name in sets)
        say(f"mean drop, in percentage points: top-1 on ImageNet minus the mean top-1 on {titles}")
