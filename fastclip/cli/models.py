"""``fastclip models``"""

from __future__ import annotations

import argparse

__all__ = ["add"]


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = "The models that --model takes, one name a line."
    parser.set_defaults(run=_models)


def _models(args: argparse.Namespace) -> None:
    from fastclip.models.config import list_models

    print("\n".join(list_models()))
