"""``fastclip eval retrieval``: recall between images and captions."""

from __future__ import annotations

import argparse
from typing import Any

from fastclip.cli.embedding import embedder_of
from fastclip.cli.help import describe
from fastclip.cli.pictures import DATA, REFERENCE
from fastclip.cli.printing import say
from fastclip.system.plural import counted

__all__ = ["add"]

_KEYS = [f"{way}_retrieval_recall@{k}" for way in ("text", "image") for k in (1, 5, 10)]
_HEAD = ("", "I->T R@1", "R@5", "R@10", "T->I R@1", "R@5", "R@10")


def add(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Measure the recall at 1, 5 and 10 of images retrieved by captions (T->I) and of captions by images (I->T).",
        "fastclip eval retrieval --checkpoint runs/b32 --data dataset_flickr30k.json:test --output retrieval.json",
        "fastclip eval retrieval --checkpoint runs/digits --data digits --unique-captions",
    )
    parser.add_argument("--data", required=True, metavar="SPEC", help=DATA)
    parser.add_argument(
        "--captions", type=int, metavar="N", help="use only the first N captions of each image (default: all)"
    )
    parser.add_argument(
        "--unique-captions",
        action="store_true",
        help="treat captions with the same words as one caption, which belongs to all of its images",
    )
    parser.add_argument(
        "--reference",
        choices=("flickr30k", "coco"),
        help=f"{REFERENCE} (default: the dataset of --data, if --data is the test split of Flickr30K or COCO)",
    )
    parser.add_argument(
        "--details",
        metavar="FILE",
        help="JSON lines file with the rank and the five most similar results of every query (default: no file)",
    )
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
    skipped = counted(retrieval.skipped, "image")
    say(f"{counted(images, 'image')}, {counted(captions, 'caption')}, {skipped} cannot be used")
    if retrieval.repeated and not args.unique_captions:
        say(
            f"captions that also belong to other images: {retrieval.repeated:,}; for such a caption, only the image of "
            "its pair is a right answer; with --unique-captions, all of its images are"
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
    """Return the name of the dataset if the source is exactly its test split, otherwise an empty string."""
    return source.dataset if getattr(source, "splits", ()) == ("test",) else ""
