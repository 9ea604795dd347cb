"""Options of the commands that embed images or texts with a checkpoint."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING, Any

from fastclip.cli.help import add_training_option
from fastclip.cli.pictures import add_max_pixels, add_workers

if TYPE_CHECKING:
    from fastclip.models.embedder import Embedder

__all__ = [
    "DEVICE",
    "add_batch_size",
    "add_embedder_options",
    "add_model_options",
    "add_reading_options",
    "embedder_of",
    "embedder_options",
    "model_options",
]


DEVICE = "device to compute on"


def add_embedder_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the options that select the model and its computation, for `embedder_of`.

    Args:
        required: whether ``--checkpoint`` is required. If it is not, the checkpoint, the model and the precision
            default to those of the run on which the command reports.
    """
    checkpoint = (
        "folder of a run, its model/ or one of its checkpoints/step-..., or a local file or folder in the format of "
        "OpenAI, open_clip or Hugging Face"
    )
    parser.add_argument(
        "--checkpoint",
        required=required,
        metavar="PATH",
        help=checkpoint if required else f"{checkpoint} (default: model/ of the run)",
    )
    add_model_options(parser)
    parser.add_argument(
        "--vocabulary",
        metavar="PATH",
        help="vocabulary file of BERT, for models with a BERT text tower (default: looked for beside the checkpoint)",
    )
    parser.add_argument(
        "--device", metavar="{cpu,cuda,cuda:N}", help=f"{DEVICE} (default: a GPU if there is one, otherwise the CPU)"
    )
    add_training_option(
        parser,
        "precision",
        choices=("fp32", "bf16"),
        default_words="bf16 on a GPU, fp32 otherwise" if required else "the precision of the run",
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that describe the model in a checkpoint; `model_options` reads them."""
    add_training_option(parser, "model", default_words="the configuration that the checkpoint contains")
    add_training_option(parser, "image_size", type=int, default_words="the checkpoint's")
    add_training_option(parser, "context_length", type=int, default_words="the checkpoint's")


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `add_model_options` as arguments of `load_embedder`."""
    return {name: getattr(args, name) for name in ("model", "image_size", "context_length")}


def embedder_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `add_embedder_options`, except --checkpoint, as arguments of `load_embedder`."""
    return model_options(args) | {name: getattr(args, name) for name in ("device", "precision", "vocabulary")}


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that control how images are read."""
    add_batch_size(parser, default=256)
    add_workers(parser)
    add_max_pixels(parser)


def add_batch_size(parser: argparse.ArgumentParser, *flags: str, default: int) -> None:
    """Add ``--batch-size``, after `flags`."""
    parser.add_argument(
        *flags, "--batch-size", type=int, default=default, metavar="N", help="images embedded at a time"
    )


def embedder_of(args: argparse.Namespace) -> Embedder:
    """Load the model, and show the progress of the command in the log from here on."""
    from fastclip.models.embedder import load_embedder

    logging.getLogger("fastclip").setLevel(logging.INFO)
    return load_embedder(args.checkpoint, **embedder_options(args))
