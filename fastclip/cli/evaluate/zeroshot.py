"""``fastclip eval zeroshot``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from fastclip.cli.embedding import embedder_of
from fastclip.cli.printing import say

if TYPE_CHECKING:
    from fastclip.embedding.features import FeatureStore

__all__ = ["add", "add_templates_option", "percent"]


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = "Classify pictures by captions of their classes, without training on them."
    parser.add_argument(
        "--data",
        required=True,
        metavar="SPEC",
        help="a folder of class folders, digits, or hf: with a column `label`",
    )
    parser.add_argument(
        "--classes",
        metavar="FILE",
        help="class names, one a line, which go with the folders or the data's classes by name (CLASS<TAB>NAME pairs "
        "any two); or imagenet, imagenet-a or imagenet-r, whose classes all count (default: the folders' names; CLIP's "
        "for WordNet ids)",
    )
    add_templates_option(parser, default="the data's own, else openai")
    parser.add_argument("--details", metavar="FILE", help="JSON of every class: acc1, and what it is taken for")
    parser.set_defaults(run=_run)


def add_templates_option(parser: argparse.ArgumentParser, *, default: str) -> None:
    parser.add_argument(
        "--templates",
        metavar="FILE",
        help=f"captions with {{}} for the class name, one a line; openai, CLIP's 80, or simple, its 7 ({default})",
    )


def percent(value: float | None) -> float | None:
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
