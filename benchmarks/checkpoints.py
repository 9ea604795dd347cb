"""Cost of checkpoints per training step, written at once or in the background; rows in results/checkpoints.csv.

    OMP_NUM_THREADS=1 python -m benchmarks.checkpoints --model ViT-tiny --save-every 1,10 --rounds 5

A round runs every kind in turn, from the same weights on the same data: without checkpoints (except one at the end,
which the clock includes), with checkpoints in the background, and with checkpoints written at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.harness import Timings, append, quantile
from fastclip.training import TrainOptions, train

RESULTS = Path(__file__).parent / "results" / "checkpoints.csv"
KINDS = ("none", "background", "at once")


def seconds_a_step(options: TrainOptions, kind: str, save_every: int) -> tuple[float, int]:
    """Return the seconds per step, by the wall clock of the whole loop with the last write, and the bytes of a
    checkpoint.
    """
    with TemporaryDirectory(dir=options.output) as folder:
        every = None if kind == "none" else save_every
        run = train(replace(options, output=folder, save_every=every, async_save=kind != "at once"))
        last = max((run.folder / "checkpoints").glob("step-*"))
        return run.seconds / run.steps, sum(file.stat().st_size for file in last.iterdir())


def measure(options: TrainOptions, save_every: int, rounds: int) -> list[dict[str, Any]]:
    timings, size, load = Timings(), 0, os.getloadavg()[0]
    seconds_a_step(replace(options, max_steps=2), "background", 1)  # costs that occur only once
    for _ in range(rounds):
        for kind in KINDS:
            seconds, size = seconds_a_step(options, kind, save_every)
            timings.rounds.setdefault(kind, []).append(seconds)
    rows = []
    for kind, seconds in timings.rounds.items():
        extra = [a - b for a, b in zip(seconds, timings.rounds["none"], strict=True)]
        rows.append(
            {
                "model": options.model,
                "batch_size": options.batch_size,
                "steps": options.max_steps,
                "save_every": save_every,
                "kind": kind,
                "checkpoint_mib": round(size / 2**20, 1),
                "rounds": rounds,
                "median_ms": round(statistics.median(seconds) * 1e3, 2),
                "p20_ms": round(quantile(seconds, 0.2) * 1e3, 2),
                "p80_ms": round(quantile(seconds, 0.8) * 1e3, 2),
                "extra_ms_a_step": round(statistics.median(extra) * 1e3, 2),
                "load": round(load, 1),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-tiny", help="name of the model (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=256, help="pairs per step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps of each run (default: %(default)s)")
    parser.add_argument(
        "--save-every",
        default="1,10",
        help="steps between two checkpoints, several values separated by commas (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each run (default: %(default)s)")
    parser.add_argument("--folder", default=".", help="folder on the disk to measure (default: %(default)s)")
    parser.add_argument("--rows", type=Path, default=RESULTS, help="CSV file to add rows to (default: %(default)s)")
    arguments = parser.parse_args()
    logging.getLogger("fastclip").setLevel(logging.ERROR)
    options = TrainOptions(
        data="digits",
        model=arguments.model,
        output=arguments.folder,
        context_length=16,
        loss="unicl",
        batch_size=arguments.batch_size,
        max_steps=arguments.steps,
        workers=0,
    )
    for save_every in map(int, arguments.save_every.split(",")):
        measured = measure(options, save_every, arguments.rounds)
        append(arguments.rows, measured)
        for row in measured:
            print(*row.values(), sep="\t", flush=True)


if __name__ == "__main__":
    main()
