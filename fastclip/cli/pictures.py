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
# Datasets of `fastclip.evaluation.published.TOP1`, which a test compares; its import would load more than help needs
_TOP1 = (
    *("food101", "cifar10", "cifar100", "sun397", "cars", "aircraft"),
    *("voc2007", "dtd", "pets", "caltech101", "flowers", "imagenet"),
)
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
        help="images with classes: a folder with one subfolder per class, `digits` (the built-in example dataset: "
        "scikit-learn's handwritten digits), tar shards with class numbers in .cls members, or `hf:NAME` or "
        "`hf:NAME:SPLIT` (a dataset of the Hugging Face Hub that has a column `label`)",
    )


def add_reference(parser: argparse.ArgumentParser, data: str) -> None:
    """Add ``--reference``, a dataset of `fastclip.evaluation.published.TOP1`.

    Without the option, the folder in the option `data` selects the dataset (`published.top1_dataset`).
    """
    parser.add_argument(
        "--reference",
        metavar="NAME",
        help=f"{REFERENCE}: {', '.join(_TOP1[:-1])} or {_TOP1[-1]} (default: the dataset of this list whose name "
        f"the {data} folder has, or the folder above a split such as food101/test; otherwise none)",
    )


def _limit(text: str) -> int:
    from fastclip.data.picture import limit_pixels

    try:
        pixels = int(float(text))
        limit_pixels(pixels)
    except (OverflowError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"must be a positive number of pixels, such as 200e6, got {text!r}") from error
    return pixels
