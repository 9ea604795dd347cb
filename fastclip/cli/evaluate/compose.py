"""``fastclip eval compose``: retrieval of images by sums and differences of images and texts."""

from __future__ import annotations

import argparse
from typing import Any

from fastclip.cli.embedding import embedder_of
from fastclip.cli.help import describe
from fastclip.cli.pictures import DATA, add_top
from fastclip.cli.printing import say
from fastclip.data.faults import shown
from fastclip.system.plural import counted

__all__ = ["add"]


def add(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Retrieve images by queries that add and subtract images and texts, as in the paper of ALIGN. A query on the "
        'built-in digits is, for example, digits/NNNN + "a handwritten two" with the number of a held-out image.',
        "fastclip eval compose --checkpoint runs/b32 --data photos.csv --queries queries.txt --sheet sheet.png",
        "fastclip eval compose --checkpoint runs/digits --data digits --queries queries.txt --top 3",
    )
    parser.add_argument("--data", required=True, metavar="SPEC", help=DATA)
    parser.add_argument(
        "--queries",
        required=True,
        metavar="FILE",
        help='text file with one query per line, such as bus.jpg + "at night" - 0.5:rain. A term is the name of an '
        "image of --data, the path of another image, or a text; words in quotes are always a text, and a number and a "
        'colon give the weight of a term. "=> target.jpg" at the end of a line names the image that should be found',
    )
    add_top(parser)
    parser.add_argument(
        "--sheet",
        metavar="FILE",
        help="PNG file that shows the retrieved images, one row per query, for the first 50 queries (default: no file)",
    )
    parser.set_defaults(run=_run)


def _terms(query: Any) -> list[dict[str, Any]]:
    """Return the terms of a query as the results record them."""
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
    counts = counted(len(composed.source), "image"), counted(len(answers), "query", "queries")
    say(f"{', '.join(counts)}, {counted(composed.skipped, 'image')} cannot be used")
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
