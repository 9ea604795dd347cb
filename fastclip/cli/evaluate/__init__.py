"""``fastclip eval``, a module a task."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

from fastclip.cli.embedding import add_embedder_options, add_reading_options
from fastclip.cli.evaluate import compose, probe, retrieval, robustness, zeroshot
from fastclip.cli.outputs import add_force, owned_files

__all__ = ["add"]

_TASKS: dict[str, tuple[ModuleType, str]] = {
    "zeroshot": (zeroshot, "classify by captions of the classes"),
    "robustness": (robustness, "ImageNet and -V2, -R, -A, -Sketch with one zero-shot head"),
    "retrieval": (retrieval, "captions by pictures and pictures by captions: recall at 1, 5 and 10"),
    "compose": (compose, "pictures by a picture and words, added and subtracted"),
    "probe": (probe, "logistic regression on image features"),
}


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = "What a model is worth: a table, and JSON with the keys of CLIP_benchmark."
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, (module, summary) in _TASKS.items():
        task = tasks.add_parser(name, help=summary)
        add_embedder_options(task)
        add_reading_options(task)
        task.add_argument("--output", metavar="FILE", help="JSON of the results")
        add_force(task)
        module.add(task)
        task.set_defaults(run=partial(_run, task.get_default("run")))


def _run(evaluate: Callable[[argparse.Namespace], tuple[Any, Any]], args: argparse.Namespace) -> None:
    """Evaluate, when all files that are to be written can be; write the results, and clear the stores after that.

    `evaluate` returns both; a stop before leaves the stores for the next run of the command.
    """
    from fastclip.evaluation.results import write_results

    with owned_files(args, *(name for name in ("output", "details", "plot", "sheet") if hasattr(args, name))):
        results, stores = evaluate(args)
        if args.output:
            write_results(args.output, results)
        for store in stores:
            store.clear()
