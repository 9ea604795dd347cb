"""``fastclip eval retrieval``."""

from __future__ import annotations

import argparse
from typing import Any

from fastclip.cli.embedding import embedder_of
from fastclip.cli.printing import say

__all__ = ["add"]

_KEYS = [f"{way}_retrieval_recall@{k}" for way in ("text", "image") for k in (1, 5, 10)]
_HEAD = ("", "I->T R@1", "R@5", "R@10", "T->I R@1", "R@5", "R@10")


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = "Recall at 1, 5 and 10 of pictures by captions (T->I) and of captions by pictures (I->T)."
    parser.add_argument(
        "--data", required=True, metavar="SPEC", help="dataset_coco.json:test, or as fastclip train --data"
    )
    parser.add_argument("--captions", type=int, metavar="N", help="the first N captions of every picture; default: all")
    parser.add_argument(
        "--unique-captions",
        action="store_true",
        help="captions of the same words are one, which belongs to all its pictures; default: each to its own picture",
    )
    parser.add_argument(
        "--reference",
        choices=("flickr30k", "coco"),
        help="published results to print beside; default: those of the test split of such a file",
    )
    parser.add_argument("--details", metavar="FILE", help="JSON lines: every query's rank and five most similar")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from fastclip.data.spec import open_source
    from fastclip.evaluation.captioned import evaluate_retrieval
    from fastclip.evaluation.published import RETRIEVAL
    from fastclip.evaluation.results import result, table, write_lines, write_results

    source = open_source(args.data, held_out=True)
    embedder = embedder_of(args)
    found = evaluate_retrieval(
        embedder,
        source,
        captions=args.captions,
        unique=args.unique_captions,
        batch_size=args.batch_size,
        workers=args.workers,
        progress=True,
    )
    own = {name: 100 * value for name, value in found.metrics.items()}
    rows = {embedder.name: own} | RETRIEVAL.get(args.reference or _reference(source), {})
    say(table(_HEAD, [[name, *(row.get(key) for key in _KEYS)] for name, row in rows.items()]))
    say(f"{len(found.keys):,} images, {len(found.texts):,} captions, {found.skipped:,} images cannot be used")
    if found.repeated and not args.unique_captions:
        say(
            f"{found.repeated:,} captions are also those of other images, each of which counts as a wrong answer; "
            "--unique-captions counts them as right"
        )
    if args.output:
        counts = {"images": len(found.keys), "captions": len(found.texts), "skipped": found.skipped}
        counts |= {"repeated_captions": found.repeated, "unique_captions": args.unique_captions}
        write_results(
            args.output,
            result(
                dataset=source.spec,
                task="zeroshot_retrieval",
                model=embedder.name,
                pretrained=args.checkpoint,
                metrics=found.metrics,
                **counts,
            ),
        )
    if args.details:
        write_lines(args.details, found.details())
    for store in found.stores:
        store.clear()


def _reference(source: Any) -> str:
    """The data set whose test split, and nothing else, the source is."""
    return source.dataset if getattr(source, "splits", ()) == ("test",) else ""
