"""``fastclip embed``: compute the embeddings of a dataset."""

from __future__ import annotations

import argparse

from fastclip.cli.embedding import add_embedder_options, add_reading_options, embedder_of
from fastclip.cli.help import describe
from fastclip.cli.outputs import add_force, owned_output
from fastclip.cli.pictures import DATA
from fastclip.cli.printing import complain, say
from fastclip.system.plural import counted

__all__ = ["add"]


def add(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Compute the embeddings of images and captions, and write them with a table of the samples in the layout of "
        "clip-retrieval: img_emb/, text_emb/ and metadata/. If SPEC is a folder of images without captions, only the "
        "images are embedded. Re-run the same command to resume; the output is byte-identical to that of an "
        "uninterrupted run.",
        "fastclip embed digits --checkpoint runs/digits --output vectors",
        "fastclip embed 'shards/{0000..0099}.tar' --checkpoint runs/b32 --output vectors --workers 8",
    )
    parser.add_argument("spec", metavar="SPEC", help=DATA)
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="output folder for the embeddings of images and texts, and the metadata",
    )
    add_force(parser)
    parser.add_argument(
        "--dtype", choices=("float16", "float32"), default="float16", help="data type of the written embeddings"
    )
    parser.add_argument(
        "--samples-per-file", type=int, default=1_000_000, metavar="N", help="samples per file of embeddings"
    )
    add_embedder_options(parser)
    add_reading_options(parser)
    parser.set_defaults(run=_embed)


def _embed(args: argparse.Namespace) -> None:
    from pathlib import Path

    from fastclip.curation.embed import embed_source
    from fastclip.data.sources.folder import Uncaptioned
    from fastclip.data.spec import open_pictures

    options = {name: getattr(args, name) for name in ("dtype", "samples_per_file", "batch_size", "workers")}
    with owned_output(args):
        source = open_pictures(args.spec)
        if alone := isinstance(source, Uncaptioned):
            complain(f"fastclip: {args.spec}: no image has a caption, so only images are embedded")
        done = embed_source(embedder_of(args), source, Path(args.output), progress=True, texts=not alone, **options)
    kept = f", {done.kept} of which already existed" if done.kept else ""
    say(f"wrote {args.output}: {counted(done.samples, 'sample')} in {counted(done.files, 'file')}{kept}")
    if done.faults.total:
        say(f"skipped: {done.faults}")
