"""``fastclip filter``: keep the pairs whose picture and caption agree."""

from __future__ import annotations

import argparse

from fastclip.cli.embedding import add_embedder_options, add_reading_options, embedder_of
from fastclip.cli.outputs import add_force, owned_output
from fastclip.cli.printing import say

__all__ = ["add"]


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write the samples whose caption has a cosine of THRESHOLD or more with the picture as tar shards in "
        "img2dataset's layout, with a histogram and counts. The same call again goes on."
    )
    parser.add_argument("--data", required=True, metavar="SPEC", help="as of fastclip train --data")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the shards, counts and histogram")
    add_force(parser)
    parser.add_argument(
        "--threshold", type=float, metavar="COSINE", help="such as 0.3; without it nothing but the similarities"
    )
    parser.add_argument(
        "--dedup",
        type=float,
        metavar="COSINE",
        help="drop a picture so near to one before it, such as 0.95; 1: the same",
    )
    parser.add_argument("--samples-per-shard", type=int, default=10_000, metavar="N", help="(10000)")
    parser.add_argument(
        "--scores", metavar="DIR", help="what is computed, to be used with other thresholds (OUTPUT/scores)"
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
