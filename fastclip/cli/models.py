"""``fastclip models``: the names of the models."""

from __future__ import annotations

import argparse

from fastclip.cli.help import describe

__all__ = ["add"]


def add(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Print the names that --model takes, one per line.",
        "fastclip models",
        "fastclip models | grep ViT",
    )
    parser.set_defaults(run=_models)


def _models(args: argparse.Namespace) -> None:
    from fastclip.models.config import list_models

    print("\n".join(list_models()))
