"""``fastclip report``: write an HTML report of a training run."""

from __future__ import annotations

import argparse

from fastclip.cli.embedding import add_embedder_options, add_reading_options, embedder_options
from fastclip.cli.help import describe
from fastclip.cli.outputs import add_force, owned_files
from fastclip.cli.pictures import DATA, MAX_SAMPLES
from fastclip.cli.printing import say

__all__ = ["add"]


def add(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Write an HTML report of a training run: key figures, curves, the most confused classes, and the best and "
        "worst retrievals with their images. The file needs no other files and no network. While a run is in progress, "
        "--checkpoint can name one of its checkpoints/step-... folders.",
        "fastclip report runs/digits",
        "fastclip report runs/b32 --data pairs.csv --results zeroshot.json retrieval.json --output b32.html",
        "fastclip report runs/b32 --checkpoint runs/b32/checkpoints/step-00012000",
    )
    parser.add_argument("folder", metavar="RUN", help="folder of a run of fastclip train")
    parser.add_argument("--data", metavar="SPEC", help=f"{DATA} (default: --val-data of the run)")
    parser.add_argument(
        "--output", metavar="FILE", help="HTML file to write (default: report.html in the folder of the run)"
    )
    add_force(parser)
    parser.add_argument(
        "--results",
        nargs="+",
        default=[],
        metavar="FILE",
        help="JSON files of fastclip eval that the report shows (default: none)",
    )
    parser.add_argument("--max-samples", type=int, default=5000, metavar="N", help=MAX_SAMPLES)
    add_embedder_options(parser, required=False)
    add_reading_options(parser)
    parser.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    import logging
    from pathlib import Path

    from fastclip.report.page import write_report

    logging.getLogger("fastclip").setLevel(logging.INFO)
    names = ("output", "data", "checkpoint", "results", "max_samples", "batch_size", "workers")
    if args.output is None and Path(args.folder).is_dir():  # otherwise `write_report` names the missing folder
        args.output = Path(args.folder) / "report.html"
    with owned_files(args, "output"):
        options = {name: getattr(args, name) for name in names} | embedder_options(args)
        say(write_report(args.folder, progress=True, **options))
    return 0
