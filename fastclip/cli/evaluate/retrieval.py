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


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    from fastclip.data.spec import open_source
    from fastclip.evaluation.caption_retrieval import evaluate_retrieval
    from fastclip.evaluation.published import RETRIEVAL
    from fastclip.evaluation.results import result, table, write_lines

    source = open_source(args.data, held_out=True)
    embedder = embedder_of(args)
    retrieval = evaluate_retrieval(
        embedder,
        source,
        captions=args.captions,
        unique=args.unique_captions,
        batch_size=args.batch_size,
        workers=args.workers,
        progress=True,
    )
    recalls = {name: 100 * value for name, value in retrieval.metrics.items()}
    rows = {embedder.name: recalls} | RETRIEVAL.get(args.reference or _reference(source), {})
    say(table(_HEAD, [[name, *(row.get(key) for key in _KEYS)] for name, row in rows.items()]))
    images, captions = len(retrieval.keys), len(retrieval.texts)
    say(f"{images:,} images, {captions:,} captions, {retrieval.skipped:,} images cannot be used")
    if retrieval.repeated and not args.unique_captions:
        say(
            f"{retrieval.repeated:,} captions are also those of other images, each of which counts as a wrong answer; "
            "--unique-captions counts them as right"
        )
    if args.details:
        write_lines(args.details, retrieval.details())
    results = result(
        dataset=source.spec,
        task="zeroshot_retrieval",
        model=embedder.name,
        pretrained=args.checkpoint,
        metrics=retrieval.metrics,
        images=images,
        captions=captions,
        skipped=retrieval.skipped,
        repeated_captions=retrieval.repeated,
        unique_captions=args.unique_captions,
    )
    return results, retrieval.stores


def _reference(source: Any) -> str:
    """The data set whose test split, and nothing else, the source is."""
    return source.dataset if getattr(source, "splits", ()) == ("test",) else ""
