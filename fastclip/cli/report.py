"""``fastclip report``"""

from __future__ import annotations

import argparse

from fastclip.cli.embedding import add_embedder_options, add_reading_options, embedder_options
from fastclip.cli.outputs import add_force, owned_files
from fastclip.cli.printing import say

__all__ = ["add"]


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write a run as one HTML file: key figures, curves, which classes are confused, the best and the worst "
        "retrievals with their pictures. It needs no other file and no network. Model, data and precision are the "
        "run's where nothing else is said; --checkpoint may also be one of its checkpoints/step-..., while it goes on."
    )
    parser.add_argument("folder", metavar="RUN", help="folder of a run of fastclip train")
    parser.add_argument("--data", metavar="SPEC", help="what the model is to see; default: the run's --val-data")
    parser.add_argument("--output", metavar="FILE", help="default: report.html in the run's folder")
    add_force(parser)
    parser.add_argument("--results", nargs="+", default=[], metavar="FILE", help="JSON of fastclip eval, to be shown")
    parser.add_argument("--max-samples", type=int, default=5000, metavar="N", help="of the data, evenly spread (5000)")
    add_embedder_options(parser, required=False)
    add_reading_options(parser)
    parser.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    import logging
    from pathlib import Path

    from fastclip.report.page import write_report

    logging.getLogger("fastclip").setLevel(logging.INFO)
    names = ("output", "data", "checkpoint", "results", "max_samples", "batch_size", "workers")
    if args.output is None and Path(args.folder).is_dir():  # else the error names the folder
        args.output = Path(args.folder) / "report.html"
    with owned_files(args, "output"):
        options = {name: getattr(args, name) for name in names} | embedder_options(args)
        say(write_report(args.folder, progress=True, **options))
    return 0
