"""``fastclip embed``: a data set as vectors."""

from __future__ import annotations

import argparse

from fastclip.cli.embedding import add_embedder_options, add_reading_options, embedder_of
from fastclip.cli.outputs import add_force, owned_output
from fastclip.cli.printing import complain, say

__all__ = ["add"]


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write the vectors of pictures and captions, and a table of both, in clip-retrieval's layout: img_emb/, "
        "text_emb/ and metadata/. The same call again goes on. Of a folder without captions: pictures alone."
    )
    parser.add_argument("spec", metavar="SPEC", help="as of fastclip train --data")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory of the images, texts and metadata")
    add_force(parser)
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of the vectors (float16)")
    parser.add_argument("--samples-per-file", type=int, default=1_000_000, metavar="N", help="(1000000)")
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
            complain(f"fastclip: {args.spec}: no picture has a caption, so pictures alone are embedded")
        done = embed_source(embedder_of(args), source, Path(args.output), progress=True, texts=not alone, **options)
    kept = f", {done.kept} of which were there" if done.kept else ""
    say(f"wrote {args.output}: {done.samples:,} samples in {done.files:,} files{kept}")
    if done.faults.total:
        say(f"left out: {done.faults}")
