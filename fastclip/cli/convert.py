"""``fastclip convert``"""

from __future__ import annotations

import argparse

from fastclip.cli.embedding import add_model_options, model_options
from fastclip.cli.outputs import add_force, owned_files, owned_output
from fastclip.cli.printing import say

__all__ = ["add"]


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Read a checkpoint of any known form and write another. Weights are not changed, unless --image-size or "
        "--context-length asks for it. What is at the target is replaced whole; the source is not overwritten."
    )
    parser.add_argument("source", help="checkpoint: a file or a folder, also that of a run of fastclip train")
    parser.add_argument("target", help="folder, or for open_clip a file ending in .pt or .safetensors")
    parser.add_argument("--to", required=True, choices=("open_clip", "huggingface", "fastclip"), help="form to write")
    add_force(parser)
    add_model_options(parser)
    parser.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> None:
    from fastclip.models.convert import check_target, convert, is_file_target
    from fastclip.models.embedder import load_model
    from fastclip.system.owner import output_path

    check_target(output_path(args.target), args.to)
    lock = owned_files if is_file_target(output_path(args.target)) else owned_output
    with lock(args, "target"):
        model, source = load_model(args.source, **model_options(args))
        convert(model, args.target, form=args.to, source=source)
    say(f"wrote {args.target}: {sum(p.numel() for p in model.parameters()):,} parameters in the form of {args.to}")
