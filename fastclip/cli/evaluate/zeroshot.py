"""``fastclip eval zeroshot``: classification without training."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from fastclip.cli.embedding import embedder_of
from fastclip.cli.help import describe
from fastclip.cli.pictures import add_labelled_data
from fastclip.cli.printing import say

if TYPE_CHECKING:
    from fastclip.embedding.features import FeatureStore

__all__ = ["add", "add_templates_option", "percent"]


def add(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Classify images by captions of the classes, without training.",
        "fastclip eval zeroshot --checkpoint runs/digits --data digits --output zeroshot.json",
        "fastclip eval zeroshot --checkpoint ViT-B-32.pt --model ViT-B-32 --data imagenet/val --classes imagenet",
        "fastclip eval zeroshot --checkpoint runs/b32 --data scans --templates templates.txt --details classes.json",
    )
    add_labelled_data(parser)
    parser.add_argument(
        "--classes",
        metavar="FILE",
        help="text file with the names of all classes, one per line. A name is matched with the class of the data that "
        "has this name; if every line is CLASS<TAB>NAME, the lines give the classes new names. In place of a file, "
        "imagenet, imagenet-a or imagenet-r stands for the built-in names of the classes of that dataset (default: the "
        "names of the folders, or CLIP's names for folders that are named by WordNet ids)",
    )
    add_templates_option(parser, default="the templates that come with the dataset, otherwise openai")
    parser.add_argument(
        "--details",
        metavar="FILE",
        help="JSON file with the accuracy of every class and the classes it is confused with (default: no file)",
    )
    parser.set_defaults(run=_run)


def add_templates_option(parser: argparse.ArgumentParser, *, default: str) -> None:
    """Add ``--templates``; `default` is the description of the default."""
    parser.add_argument(
        "--templates",
        metavar="FILE",
        help="text file with one caption template per line, in which {} stands for the class name. In place of a file, "
        f"openai stands for the 80 templates of CLIP, and simple for 7 of these (default: {default})",
    )


def percent(value: float | None) -> float | None:
    """Return a share as a percentage; None stays None."""
    return None if value is None else 100 * value


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], list[FeatureStore]]:
    from fastclip.data.spec import open_labelled
    from fastclip.evaluation.results import table, write_results
    from fastclip.evaluation.zero_shot import class_accuracies, templates_for, zero_shot

    source = open_labelled(args.data, classes=args.classes)
    templates = templates_for(source, args.templates)
    stores: list[FeatureStore] = []
    answers = zero_shot(
        embedder_of(args),
        source,
        templates=templates,
        pretrained=args.checkpoint,
        batch_size=args.batch_size,
        workers=args.workers,
        progress=True,
        stores=stores,
    )
    metrics = answers.result["metrics"]
    row = [args.data, answers.result["classes"], answers.result["images"], *map(percent, metrics.values())]
    say(table(["data", "classes", "images", *metrics], [row]))
    if args.details:
        write_results(args.details, class_accuracies(answers, source.class_names))
    return answers.result, stores
