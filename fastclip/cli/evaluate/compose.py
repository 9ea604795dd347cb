"""``fastclip eval compose``."""

from __future__ import annotations

import argparse
from typing import Any

from fastclip.cli.embedding import embedder_of
from fastclip.cli.printing import say
from fastclip.data.faults import shown

__all__ = ["add"]


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = "Pictures by a picture and words, added and subtracted, as in ALIGN's paper."
    parser.add_argument("--data", required=True, metavar="SPEC", help="pictures to search, as fastclip train --data")
    parser.add_argument(
        "--queries",
        required=True,
        metavar="FILE",
        help='one a line: bus.jpg + "at night" - 0.5:rain; with a picture that should be found: ... => target.jpg',
    )
    parser.add_argument("--top", type=int, default=10, metavar="K", help="pictures of a query (10)")
    parser.add_argument("--sheet", metavar="PNG", help="the pictures found, a row a query, of the first 50 queries")
    parser.set_defaults(run=_run)


def _terms(query: Any) -> list[dict[str, Any]]:
    """How a line was read."""
    return [{"weight": term.weight, "text": term.text} for term in query.terms]


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    from fastclip.data.spec import open_source
    from fastclip.evaluation.composed_retrieval import compose, read_queries
    from fastclip.evaluation.contact_sheet import write_sheet
    from fastclip.evaluation.results import result, table

    queries = read_queries(args.queries)
    source = open_source(args.data, held_out=True)
    embedder = embedder_of(args)
    composed = compose(
        embedder, source, queries, top=args.top, batch_size=args.batch_size, workers=args.workers, progress=True
    )
    answers: list[dict[str, Any]] = []
    for answer in composed.answers:
        pictures = [{"key": composed.source.key(place), "score": score} for place, score in answer.pictures]
        rank = None if answer.rank is None else answer.rank + 1
        answers.append({"query": answer.query.line, "rank": rank, "pictures": pictures, "terms": _terms(answer.query)})
        say(answer.query.line)
        for picture in pictures:
            say(f"  {picture['score']:.3f}  {shown(str(picture['key']))}")
    say(f"{len(composed.source):,} images, {len(answers):,} queries, {composed.skipped:,} images cannot be used")
    if composed.metrics:
        row = [embedder.name, *(100 * value for value in composed.metrics.values())]
        say(table(("", "R@1", "R@5", "R@10"), [row]))
    if args.sheet:
        write_sheet(args.sheet, composed)
    results = result(
        dataset=source.spec,
        task="composed_retrieval",
        model=embedder.name,
        pretrained=args.checkpoint,
        metrics=composed.metrics,
        images=len(composed.source),
        skipped=composed.skipped,
        queries=answers,
    )
    return results, composed.stores
