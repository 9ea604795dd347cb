"""Options of the commands that read images."""

from __future__ import annotations

import argparse

from fastclip.cli.help import add_training_option

__all__ = [
    "DATA",
    "MAX_SAMPLES",
    "REFERENCE",
    "add_labelled_data",
    "add_max_pixels",
    "add_reference",
    "add_top",
    "add_workers",
]

DATA = "dataset, in any form that `fastclip train --data` takes"
REFERENCE = "dataset whose published results are shown as well"
MAX_SAMPLES = "largest number of samples to read, evenly spread over the data"


def add_max_pixels(parser: argparse.ArgumentParser) -> None:
    """Add ``--max-pixels``, which takes effect when it is parsed, for everything that the process reads afterwards."""
    add_training_option(parser, "max_pixels", type=_limit, default_words="89478485")


def add_top(parser: argparse.ArgumentParser, *flags: str) -> None:
    """Add ``--top``, after `flags`."""
    parser.add_argument(
        *flags, "--top", type=int, default=10, metavar="N", help="number of images that are printed for a query"
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add ``--workers``, a number of processes."""
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that read images")


def add_labelled_data(parser: argparse.ArgumentParser) -> None:
    """Add ``--data`` for commands that need classes (`fastclip.data.spec.open_labelled`)."""
    parser.add_argument(
        "--data",
        required=True,
        metavar="SPEC",
        help="images with classes: a folder with one subfolder per class, digits, or hf:NAME with a column `label`",
    )


def add_reference(parser: argparse.ArgumentParser, data: str) -> None:
    """Add ``--reference``, a key of `fastclip.evaluation.published.TOP1`; without it the folder in `data` tells."""
    parser.add_argument(
        "--reference",
        metavar="{food101,imagenet,...}",
        help=f"{REFERENCE} (default: the dataset after which the folder of {data} is named, if it has such results)",
    )


def _limit(text: str) -> int:
    from fastclip.data.picture import limit_pixels

    try:
        pixels = int(float(text))
        limit_pixels(pixels)
    except (OverflowError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"must be a positive number of pixels, such as 200e6, got {text!r}") from error
    return pixels
