"""``fastclip filter``: keep the pairs whose image and caption agree."""

from __future__ import annotations

import argparse

from fastclip.cli.embedding import add_embedder_options, add_reading_options, embedder_of
from fastclip.cli.help import describe
from fastclip.cli.outputs import add_force, add_samples_per_shard, owned_output
from fastclip.cli.pictures import DATA
from fastclip.cli.printing import say

__all__ = ["add"]


def add(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Score every caption by its cosine similarity with its image, and write the samples that reach the threshold "
        "as tar shards in the layout of img2dataset, with a histogram and counts. Re-run the same command to resume; "
        "the output is byte-identical to that of an uninterrupted run.",
        "fastclip filter --data digits --checkpoint runs/digits --output scored",
        "fastclip filter --data digits --checkpoint runs/digits --scores scored/scores --threshold 0.3 \\\n"
        "    --dedup 0.95 --output kept",
    )
    parser.add_argument("--data", required=True, metavar="SPEC", help=DATA)
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="output folder for the shards, the counts and the histogram"
    )
    add_force(parser)
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="COSINE",
        help="smallest similarity of a caption that is kept, such as 0.3 (default: similarities are computed, but no "
        "shards are written)",
    )
    parser.add_argument(
        "--dedup",
        type=float,
        metavar="COSINE",
        help="smallest similarity, such as 0.95, at which an image is dropped as a near duplicate of an earlier image; "
        "1 drops only equal images. Without --threshold no image is dropped (default: all are kept)",
    )
    add_samples_per_shard(parser)
    parser.add_argument(
        "--scores",
        metavar="DIR",
        help="folder for the similarities, which later commands with other thresholds can reuse (default: scores in "
        "the output folder)",
    )
    add_embedder_options(parser)
    add_reading_options(parser)
    parser.set_defaults(run=_filter)


def _filter(args: argparse.Namespace) -> None:
    from pathlib import Path

    from fastclip.curation.filter import filter_source
    from fastclip.data.spec import open_source
    from fastclip.evaluation.results import table
    from fastclip.system.owner import check_writable

    options = {
        name: getattr(args, name) for name in ("threshold", "dedup", "samples_per_shard", "batch_size", "workers")
    }
    with owned_output(args):
        if args.scores is not None:
            check_writable(args.scores)
        source = open_source(args.data)
        summary = filter_source(
            embedder_of(args), source, Path(args.output), scores=args.scores, progress=True, **options
        )
    share = 100 / len(source)
    rows = [[state, count, count * share] for state, count in summary["counts"].items()]
    for cause, faults in summary["causes"].items():
        rows.insert(1, [f"- {cause}", faults["count"], faults["count"] * share])
    say(table(["samples", "number", "%"], [["read", len(source), 100.0], *rows]))
    if args.threshold is None:
        at = summary["samples_at_or_above"]
        say(table(["similarity at least", "number", "%"], [[t, count, count * share] for t, count in at.items()]))
