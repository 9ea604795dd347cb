"""Everything that needs a GPU, in parts of under ten minutes: the tests marked `gpu`, then the benchmark of the losses
case by case, and of training steps.

    python -m benchmarks.gpu_check --list
    python -m benchmarks.gpu_check --minutes 9

Each part runs in its own process. A finished part is not run again: the tests if they passed on the same code, a case
if every provider that can run here has its row. The script can therefore be stopped at any time and called again.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks.gpu.checklist import ROOT, SECONDS, TESTS, Checklist, Part
from benchmarks.losses.cases import SIZES, parse_sizes, size_name
from fastclip.cli.ending import sigterm_raises


def parts(sizes: list[tuple[int, int]] = SIZES["cuda"]) -> list[Part]:
    """Return the tests, whole steps of every size (for the tables), training steps, and the
    halves of a step, in this order.
    """
    out = [Part(name) for name in TESTS]
    for loss, mode in (("softmax", "both"), ("sigmoid", "both"), ("softmax", "forward"), ("softmax", "backward")):
        if mode == "forward":
            out.append(Part("training"))
        out += [Part(f"{loss}-{mode}-{size_name(size)}", loss, mode, size) for size in sizes]
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--list", action="store_true", help="list the parts that are done and those that are left, and run nothing"
    )
    parser.add_argument(
        "--minutes", type=float, help="minutes after which everything ends and no part starts (default: no limit)"
    )
    parser.add_argument(
        "--sizes", help="sizes as NxD, separated by commas (default: all of benchmarks/losses/cases.py)"
    )
    parser.add_argument(
        "--rows",
        type=Path,
        default=ROOT / "benchmarks" / "results" / "cuda.csv",
        help="CSV file to add rows to (default: %(default)s)",
    )
    parser.add_argument(
        "--markers",
        type=Path,
        default=ROOT / "runs" / "gpu_check",
        help="folder that records the parts that are done (default: %(default)s)",
    )
    arguments = parser.parse_args()
    try:
        chosen = parts(parse_sizes(arguments.sizes, "cuda"))
    except ValueError as error:
        parser.error(f"--sizes: {error}")
    checklist = Checklist(arguments.rows.absolute(), arguments.markers)
    if arguments.list:
        for part in chosen:
            print(f"{part.name:32s} {'left' if checklist.todo(part) else 'done'}")
        return 0

    import torch

    if not torch.cuda.is_available():
        parser.error("torch finds no GPU here")
    end = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
    with sigterm_raises():  # ends the running part as well
        return check(checklist, chosen, end)


def check(checklist: Checklist, chosen: list[Part], end: float) -> int:
    """Run every part until time is up. Return 0 if all are done, 1 if one failed, 3 if some are left. Failing tests end
    the run, because wrong results are not timed.
    """
    wrong = left = 0
    for part in chosen:
        remaining = end - time.monotonic()
        if remaining <= 0:
            left += bool(checklist.todo(part))
            continue
        result = checklist.do(part, min(SECONDS, remaining))
        print(f"{part.name:32s} {result}", flush=True)
        if result.startswith("took more") and remaining < SECONDS:
            left += 1  # it had less time than its limit
        elif result not in ("done", "no test is marked gpu"):
            wrong += 1
            if not part.loss:
                return 1
    return 1 if wrong else 3 if left else 0


if __name__ == "__main__":
    sys.exit(main())
