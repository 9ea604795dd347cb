"""Options of the commands that embed pictures or texts with a checkpoint."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING, Any

from fastclip.cli.pictures import add_max_pixels

if TYPE_CHECKING:
    from fastclip.models.embedder import Embedder

__all__ = [
    "add_embedder_options",
    "add_model_options",
    "add_reading_options",
    "embedder_of",
    "embedder_options",
    "model_options",
]


def add_embedder_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Which model, and how it computes; for `embedder_of`."""
    parser.add_argument(
        "--checkpoint",
        required=required,
        metavar="PATH",
        help="folder of a run, its model/, or a checkpoint of OpenAI, open_clip or Hugging Face",
    )
    add_model_options(parser)
    parser.add_argument("--vocabulary", metavar="PATH", help="of BERT, where it does not lie beside the checkpoint")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU where there is one")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, else fp32")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model a checkpoint holds; `model_options` reads them."""
    parser.add_argument("--model", help="name of the model, where the checkpoint does not hold its configuration")
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="N",
        help="pixels, to which position embeddings are interpolated; default: the checkpoint's",
    )
    parser.add_argument("--context-length", type=int, metavar="N", help="tokens a text, likewise")


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `add_model_options` as arguments of `load_embedder`."""
    return {name: getattr(args, name) for name in ("model", "image_size", "context_length")}


def embedder_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `add_embedder_options`, but --checkpoint, as arguments of `load_embedder`."""
    return model_options(args) | {name: getattr(args, name) for name in ("device", "precision", "vocabulary")}


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """How pictures are read."""
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="pictures at a time (256)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that read pictures (2)")
    add_max_pixels(parser)


def embedder_of(args: argparse.Namespace) -> Embedder:
    """Load the model. From here on the log says how far the command is."""
    from fastclip.models.embedder import load_embedder

    logging.getLogger("fastclip").setLevel(logging.INFO)
    return load_embedder(args.checkpoint, **embedder_options(args))
