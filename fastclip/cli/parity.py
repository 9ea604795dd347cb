"""``fastclip parity``"""

from __future__ import annotations

import argparse

__all__ = ["add"]


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare loss and gradients of every form of the sharded losses, on every backend and dtype that runs here, "
        "with one float64 process, and print errors beside what is promised. Starts its processes itself, or is one of "
        "torchrun's: torchrun --nproc-per-node 4 --no-python fastclip parity. Exit status 1 when a promise is broken."
    )
    parser.add_argument("--nproc", type=int, help="processes (2); under torchrun as many as it started")
    parser.add_argument("--batch", type=int, default=64, help="images of a process (64)")
    parser.add_argument("--dim", type=int, default=64, help="width of the features (64)")
    parser.add_argument("--seed", type=int, default=0, help="of the features (0)")
    parser.add_argument("--backend", help="one backend in place of all that run here")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="gloo or NCCL; GPUs where there is one for each process"
    )
    parser.set_defaults(run=_parity)


def _parity(args: argparse.Namespace) -> int:
    from fastclip import parity

    options = {name: getattr(args, name) for name in ("nproc", "batch", "dim", "seed", "backend", "device")}
    about, rows = parity.run(**options)
    if not rows:  # rank 0 prints
        return 0
    failed = sum(not row.ok for row in rows)
    print(f"{about}: relative error / promised\n\n{parity.table(rows)}\n\n{len(rows)} comparisons, {failed} failed")
    return int(failed > 0)
