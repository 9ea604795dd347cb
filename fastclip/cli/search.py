"""``fastclip search``: find images of a folder by text, by image, or by a mixture of both."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from typing import TYPE_CHECKING

from fastclip.cli.argument_order import words_in_any_order
from fastclip.cli.embedding import add_batch_size, add_embedder_options, embedder_options
from fastclip.cli.help import describe
from fastclip.cli.outputs import add_force, check_apart, owned_files
from fastclip.cli.pictures import add_max_pixels, add_top
from fastclip.cli.printing import complain, lone_names
from fastclip.data.faults import shown
from fastclip.system.cores import usable_cores
from fastclip.system.plural import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastclip.embedding.query import Term
    from fastclip.search.engine import Match, SearchEngine

__all__ = ["add", "add_index_options", "engine_of", "update"]


def add(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Print the images of a folder that are most similar to a query, one per line: the score, a tab and the path. "
        "The folder is indexed first; images that are already in the index are not read again.",
        'fastclip search "a red car" photos --checkpoint runs/b32',
        "fastclip search ./garage.jpg photos --checkpoint runs/b32 --top 3 --sheet similar.png",
        'fastclip search "2:dog + ./beach.jpg - night" photos --checkpoint runs/b32',
        "fastclip search dog photos --checkpoint runs/b32 --print0 | xargs -0 ls",
    )
    parser.add_argument(
        "query",
        metavar="QUERY",
        help="text, path of an image, or a mixture such as 2:dog + ./beach.jpg - night, in which a number and a colon "
        'give the weight of a term; words in "..." are always text',
    )
    parser.add_argument(
        "--add",
        action="append",
        default=[],
        metavar="QUERY",
        help="text or image that is added to the query; may be repeated (default: none)",
    )
    parser.add_argument(
        "--subtract",
        action="append",
        default=[],
        metavar="QUERY",
        help="text or image that is subtracted from the query; may be repeated (default: none)",
    )
    add_top(parser, "-t")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("-f", "--filepath-only", action="store_true", help="print paths without scores")
    form.add_argument("--json", action="store_true", help='print a JSON list of {"path": ..., "score": ...}')
    form.add_argument(
        "--print0",
        action="store_true",
        help="print paths, each followed by a zero byte instead of a newline, for xargs -0",
    )
    parser.add_argument("-p", "--preview", action="store_true", help="show the images in the terminal, on stderr")
    parser.add_argument(
        "--sheet",
        metavar="FILE",
        help="image file, .png, .jpg or .webp, that shows the images side by side (default: no file)",
    )
    add_force(parser)
    add_index_options(parser)
    words_in_any_order(parser)
    parser.set_defaults(run=_search)


def add_index_options(parser: argparse.ArgumentParser) -> None:
    """Add the folder, the model and the options of indexing, for `engine_of` and `update`."""
    parser.add_argument(
        "folder", nargs="?", default=".", metavar="FOLDER", help="folder of images (default: the current folder)"
    )
    add_embedder_options(parser)
    parser.add_argument(
        "--exclude-dir",
        action="append",
        metavar="NAME",
        help="name of folders that are ignored; may be repeated (default: @eaDir, node_modules and .git)",
    )
    parser.add_argument(
        "-n", "--no-indexing", action="store_true", help="search the existing index without updating it"
    )
    add_batch_size(parser, "-b", default=64)
    add_max_pixels(parser)
    parser.add_argument("--workers", type=int, metavar="N", help="threads that read images (default: one per core)")


def engine_of(args: argparse.Namespace) -> SearchEngine:
    """Open the folder for a search, and show the progress of the command in the log from here on."""
    from fastclip.search.engine import SearchEngine
    from fastclip.search.model import CheckpointModel
    from fastclip.search.scan import EXCLUDED

    logging.getLogger("fastclip").setLevel(logging.INFO)
    model = CheckpointModel(args.checkpoint, **embedder_options(args))
    return SearchEngine(model, args.folder, exclude=EXCLUDED if args.exclude_dir is None else args.exclude_dir)


def update(engine: SearchEngine, args: argparse.Namespace) -> None:
    """Bring the index up to date, unless --no-indexing is given, and report the changes."""
    if args.no_indexing:
        return
    workers = math.ceil(usable_cores()) if args.workers is None else args.workers
    done = engine.update(batch_size=args.batch_size, workers=workers, progress=True)
    if done.embedded or done.known or done.removed:
        speed = f", {done.embedded / done.seconds:,.0f} per second" if done.embedded else ""
        changes = (
            f"{done.embedded:,} embedded{speed}; {done.known:,} moved, copied or touched; {done.removed:,} removed"
        )
        complain(f"fastclip: {engine.folder}: {counted(done.files, 'image')}, {changes}")
    if known := {path for path, _ in engine.faults()} - {path for path, _ in done.skipped}:
        complain(
            f"fastclip: {counted(len(known), 'image')} skipped before still cannot be used; an image that is changed "
            "or replaced is read again"
        )


def _search(args: argparse.Namespace) -> int:
    from fastclip.embedding.query import parse_query

    if args.top < 1:
        raise ValueError(f"--top must be positive, got {args.top}")
    if args.preview and not sys.stderr.isatty():
        raise ValueError("--preview needs a terminal: use --sheet FILE to write the images into a file")
    if args.sheet and not args.sheet.lower().endswith((".png", ".jpg", ".jpeg", ".webp")):
        raise ValueError(f"--sheet must end in .png, .jpg or .webp, got {args.sheet}")
    terms = parse_query(args.query, add=args.add, subtract=args.subtract)
    if args.sheet:
        check_apart(args.sheet, [term.path for term in terms if term.path is not None], option="--sheet")
    with owned_files(args, "sheet"):
        return _answer(args, terms)


def _answer(args: argparse.Namespace, terms: Sequence[Term]) -> int:
    from fastclip.embedding.query import reading

    engine = engine_of(args)
    if text := reading(args.query, terms):
        complain(f"fastclip: the query is read as {shown(text)}")
    try:
        update(engine, args)
        matches = engine.find(terms, args.top)
    except KeyboardInterrupt:
        complain("fastclip search: interrupted; images that are already indexed are kept")
        return 130
    if not matches:
        hints = [] if engine.count() else ["check the folder"]
        hints += ["leave out --no-indexing"] if args.no_indexing else []
        others = " except those of the query" if engine.count() else ""
        advice = f": {', or '.join(hints)}" if hints else ""
        complain(f"fastclip search: no images of {engine.folder}{others} are indexed{advice}")
    _print(matches, args)
    return 0


def _print(matches: Sequence[Match], args: argparse.Namespace) -> None:
    if args.json:
        import json

        print(json.dumps([{"path": match.path, "score": round(match.score, 6)} for match in matches], indent=1))
    else:
        alone = args.filepath_only or args.print0
        lone_names([("" if alone else f"{match.score:.4f}\t", match.path) for match in matches], print0=args.print0)
    if not matches or not (args.preview or args.sheet):
        return
    from fastclip.search.contact_sheet import contact_sheet, most_tiles, terminal_picture

    if args.sheet and len(matches) > (most := most_tiles(args.sheet.suffix)):
        counts = f"the first {most:,} of {len(matches):,} images"
        complain(
            f"fastclip search: {shown(str(args.sheet))} shows {counts}, which is as many as this format can hold; "
            "a .png file shows all of them"
        )
        matches = matches[:most]
    sheet = contact_sheet(matches)
    if args.sheet:
        from PIL import Image

        from fastclip.data.picture import drawn
        from fastclip.system.durable import new_file

        with new_file(args.sheet) as half:
            sheet.save(half, Image.registered_extensions()[args.sheet.suffix.lower()], exif=drawn())
    if args.preview:
        import shutil

        from fastclip.system import env

        columns = min(shutil.get_terminal_size().columns, 120)
        sys.stderr.write(terminal_picture(sheet, protocol=env.terminal_protocol(), columns=columns))
