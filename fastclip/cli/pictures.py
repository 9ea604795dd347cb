"""Options of the commands that read pictures."""

from __future__ import annotations

import argparse

__all__ = ["add_max_pixels"]


def add_max_pixels(parser: argparse.ArgumentParser) -> None:
    """Add ``--max-pixels``, which takes effect when it is parsed, for all that the process reads afterwards."""
    parser.add_argument(
        "--max-pixels", type=_limit, metavar="N", help="pixels of the largest picture that is read (89478485)"
    )


def _limit(text: str) -> int:
    from fastclip.data.picture import limit_pixels

    try:
        pixels = int(float(text))
        limit_pixels(pixels)
    except (OverflowError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"a number of pixels, such as 200e6, is wanted, not {text!r}") from error
    return pixels
