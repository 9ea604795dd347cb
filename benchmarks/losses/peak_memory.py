"""Print the peak memory of one forward and backward pass in a new process, in MiB beyond inputs and gradients.

python -m benchmarks.losses.peak_memory --loss softmax --provider fastclip --N 4096 --D 512 --dtype float32
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor, ones_like

from benchmarks.harness import Case
from benchmarks.losses.peers import Loss
from benchmarks.losses.providers import COMPILED, MODES, leaves_of, load_losses


def _status(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return float(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {name}: peak memory is measured on Linux only")


def return_what_is_freed() -> None:
    """Give every larger block its own pages. Otherwise malloc would keep some freed ones, more or fewer from run to
    run, and the next step would appear to need less memory.
    """
    mmap_threshold = -3  # M_MMAP_THRESHOLD in malloc.h
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # glibc
        mallopt(mmap_threshold, 1 << 16)


def peak_of(step: Callable[[], None]) -> float:
    """Return the peak memory of a step in MiB, beyond the memory in use before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _step(function: Loss, image: Tensor, text: Tensor, *scalars: Tensor) -> None:
    image.grad = text.grad = None
    function(image, text, *scalars).backward()


def measure(loss: str, provider: str, N: int, D: int, dtype: str) -> float:
    """Return the MiB of peak memory beyond the features and their gradients, measured in this process."""
    return_what_is_freed()
    function = load_losses(loss, "cpu", [provider])[0][provider]
    # The small size loads libraries and starts threads. A loss that is compiled for its shape runs once at N before it
    # is measured. The others meet N only in the measurement, so that a buffer kept between steps counts.
    for size in (8, N, N) if provider in COMPILED else (8, N):
        image, text, *scalars = leaves_of(Case(loss, "both", size, D, dtype))
        image.grad, text.grad = ones_like(image), ones_like(text)  # touched, as part of the baseline
        peak = peak_of(partial(_step, function, image, text, *scalars))
    return peak


def measure_in_child(case: Case, provider: str) -> float:
    """Call `measure` in a fresh process, because a peak spans the life of a process."""
    command = [sys.executable, "-m", "benchmarks.losses.peak_memory", "--loss", case.loss, "--provider", provider]
    command += ["--N", str(case.N), "--D", str(case.D), "--dtype", case.dtype]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    return round(float(done.stdout), 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loss", choices=MODES, default="softmax", help="loss to measure (default: %(default)s)")
    parser.add_argument("--provider", required=True, help="implementation of the loss (required)")
    parser.add_argument("--N", type=int, required=True, help="pairs per batch (required)")
    parser.add_argument("--D", type=int, required=True, help="width of the features (required)")
    parser.add_argument("--dtype", required=True, help="data type of the features (required)")
    arguments = parser.parse_args()
    print(measure(**vars(arguments)))
