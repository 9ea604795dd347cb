"""The ``fastclip`` command. Each subcommand imports what it needs when it runs."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from fastclip._version import __version__

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status: 1 for what the user can mend, said on stderr."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="fastclip: %(message)s")
    try:
        args.run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"fastclip {args.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastclip", description="Contrastive image-text models.")
    parser.add_argument("--version", action="version", version=f"fastclip {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_convert(commands.add_parser("convert", help="write a checkpoint in open_clip's, Hugging Face's or our form"))
    models = commands.add_parser("models", help="list the models by name")
    models.set_defaults(run=_models)
    return parser


def _add_convert(parser: argparse.ArgumentParser) -> None:
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


def _models(args: argparse.Namespace) -> None:
    from fastclip.models.config import list_models

    print("\n".join(list_models()))
