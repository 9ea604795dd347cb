"""``fastclip convert``"""

from __future__ import annotations

import argparse

__all__ = ["add"]


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = "Read a checkpoint of any known form and write another. Weights are not changed."
    parser.add_argument("source", help="checkpoint: a file or a folder")
    parser.add_argument("target", help="folder, or for open_clip a file ending in .pt or .safetensors")
    parser.add_argument("--to", required=True, choices=("open_clip", "huggingface", "fastclip"), help="the form")
    parser.add_argument("--model", help="name of the model, where the source does not hold its configuration")
    parser.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> None:
    from fastclip.models.convert import convert
    from fastclip.models.factory import create_model

    model = create_model(args.model, args.source)
    convert(model, args.target, form=args.to)
    print(f"wrote {args.target}: {sum(p.numel() for p in model.parameters()):,} parameters in the form of {args.to}")
