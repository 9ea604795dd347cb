"""``fastclip convert``: write a checkpoint in another format."""

from __future__ import annotations

import argparse

from fastclip.cli.embedding import add_model_options, model_options
from fastclip.cli.help import describe
from fastclip.cli.outputs import add_force, owned_files, owned_output
from fastclip.cli.printing import say

__all__ = ["add"]


def add(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Read a checkpoint of fastclip, open_clip, OpenAI or Hugging Face, and write it in another format. The weights "
        "stay as they are, unless --image-size or --context-length interpolates the position embeddings. A target that "
        "exists is replaced as a whole; the source is never overwritten.",
        "fastclip convert ViT-B-32.pt b32 --to fastclip --model ViT-B-32",
        "fastclip convert runs/b32 b32.safetensors --to open_clip",
        "fastclip convert runs/b32 b32-hf --to huggingface --image-size 384",
    )
    parser.add_argument("source", metavar="SOURCE", help="checkpoint to read: a file, a folder, or the folder of a run")
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="folder to write, or, for open_clip, a file that ends in .pt or .safetensors",
    )
    parser.add_argument(
        "--to", required=True, choices=("open_clip", "huggingface", "fastclip"), help="format of the written checkpoint"
    )
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
    say(f"wrote {args.target}: {sum(p.numel() for p in model.parameters()):,} parameters, in the format of {args.to}")
