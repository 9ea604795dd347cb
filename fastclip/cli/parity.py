"""``fastclip parity``: compare the losses of several processes with those of one."""

from __future__ import annotations

import argparse

from fastclip.cli.embedding import DEVICE
from fastclip.cli.help import add_training_option, describe

__all__ = ["add"]


def add(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Compute losses and gradients over several processes: with gather, with ring, and through ClipLoss and "
        "SigLipLoss, which replace open_clip's classes, on every backend and in every dtype that runs here. Compare "
        "them with those of a single process in float64, and print each relative error beside its promised limit. The "
        "command starts its own processes, unless torchrun has started it. The exit status is 1 if an error exceeds "
        "its limit.",
        "fastclip parity --nproc 4",
        "fastclip parity --backend triton --device cuda --nproc 2",
        "torchrun --nproc-per-node 4 --no-python fastclip parity",
    )
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="processes (default: 2; under torchrun as many as it has started)"
    )
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="pairs per process")
    parser.add_argument("--dim", type=int, default=64, metavar="N", help="width of the features")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed for the features")
    add_training_option(parser, "backend", default_words="every backend that runs here")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help=f"{DEVICE} (default: cuda with NCCL if there is a GPU for each process, otherwise cpu with gloo)",
    )
    parser.set_defaults(run=_parity)


def _parity(args: argparse.Namespace) -> int:
    from fastclip import parity

    options = {name: getattr(args, name) for name in ("nproc", "batch", "dim", "seed", "backend", "device")}
    about, rows = parity.run(**options)
    if not rows:  # only rank 0 has rows to print
        return 0
    failed = sum(not row.ok for row in rows)
    print(
        f"{about}: relative errors, each with its promised limit\n\n{parity.table(rows)}\n"
        f"\n{len(rows)} comparisons, {failed} failed"
    )
    return int(failed > 0)
