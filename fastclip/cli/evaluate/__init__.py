"""``fastclip eval``, a module a task."""

from __future__ import annotations

import argparse
from types import ModuleType

from fastclip.cli.embedding import add_embedder_options, add_reading_options
from fastclip.cli.evaluate import probe

__all__ = ["add"]

_TASKS: dict[str, tuple[ModuleType, str]] = {
    "probe": (probe, "logistic regression on image features"),
}


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = "What a model is worth: a table, and JSON with the keys of CLIP_benchmark."
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, (module, told) in _TASKS.items():
        task = tasks.add_parser(name, help=told)
        add_embedder_options(task)
        add_reading_options(task)
        task.add_argument("--output", metavar="FILE", help="JSON of the results")
        module.add(task)
