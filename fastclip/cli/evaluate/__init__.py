"""``fastclip eval``: evaluate a model; each task is a module."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

from fastclip.cli.embedding import add_embedder_options, add_reading_options
from fastclip.cli.evaluate import compose, probe, retrieval, robustness, zeroshot
from fastclip.cli.help import describe
from fastclip.cli.outputs import add_force, owned_files

__all__ = ["add"]

_TASKS: dict[str, tuple[ModuleType, str]] = {
    "zeroshot": (zeroshot, "classify images by captions of their classes"),
    "robustness": (robustness, "classify ImageNet and its variants V2, R, A and Sketch"),
    "retrieval": (retrieval, "retrieve captions by image and images by caption"),
    "compose": (compose, "retrieve images by sums and differences of images and texts"),
    "probe": (probe, "fit a logistic regression on image features"),
}


def add(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Evaluate a model. Each task prints a table, and --output writes JSON with the keys of CLIP_benchmark.",
        "fastclip eval zeroshot --checkpoint runs/digits --data digits",
        "fastclip eval retrieval --checkpoint runs/b32 --data dataset_flickr30k.json:test --output retrieval.json",
    )
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, (module, summary) in _TASKS.items():
        task = tasks.add_parser(name, help=summary)
        add_embedder_options(task)
        add_reading_options(task)
        task.add_argument("--output", metavar="FILE", help="JSON file for the results (default: no file)")
        add_force(task)
        module.add(task)
        task.set_defaults(run=partial(_run, task.get_default("run")))


def _run(evaluate: Callable[[argparse.Namespace], tuple[Any, Any]], args: argparse.Namespace) -> None:
    """Lock all output files, evaluate, write the results, and then delete the features stored on disk.

    `evaluate` returns the results and the stores of these features. If the command is stopped before its end, they
    remain, and the next run of the command reuses them.
    """
    from fastclip.evaluation.results import write_results

    with owned_files(args, *(name for name in ("output", "details", "plot", "sheet") if hasattr(args, name))):
        results, stores = evaluate(args)
        if args.output:
            write_results(args.output, results)
        for store in stores:
            store.clear()
