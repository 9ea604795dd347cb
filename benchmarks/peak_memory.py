"""Peak memory of one forward and backward pass in a process of its own: prints MiB beyond inputs and gradients.

python -m benchmarks.peak_memory --provider fastclip --N 4096 --D 512 --dtype float32
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.contrastive import COMPILED, LOSSES, features


def _status(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return float(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {name}: peak memory is measured on Linux only")


def _return_what_is_freed() -> None:
    """Give every larger block pages of its own. malloc would keep freed ones for itself, more or fewer of them from run
    to run, and the next step would take as much less.
    """
    mmap_threshold = -3  # M_MMAP_THRESHOLD in malloc.h
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # glibc
        mallopt(mmap_threshold, 1 << 16)


def measure(provider: str, N: int, D: int, dtype: str) -> float:
    """MiB of peak memory beyond the features and their gradients, in this process."""
    _return_what_is_freed()
    loss = LOSSES[provider]
    scale = torch.tensor(20.0, requires_grad=True)
    # The small one loads libraries and starts threads. A loss that is compiled for its shape runs there once before it
    # is measured; the others meet N only then, so that a buffer kept between steps counts.
    for size in (8, N, N) if provider in COMPILED else (8, N):
        image, text = features(size, D, dtype)
        image.grad, text.grad = torch.ones_like(image), torch.ones_like(text)  # touched: part of the base line
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from now
        before = _status("VmRSS")
        image.grad = text.grad = None
        loss(image, text, scale).backward()
        peak = _status("VmHWM") - before
    return peak


def measure_in_child(provider: str, N: int, D: int, dtype: str) -> float:
    """`measure` in a fresh process: a peak is of the process's whole life."""
    command = [sys.executable, "-m", "benchmarks.peak_memory", "--provider", provider]
    command += ["--N", str(N), "--D", str(D), "--dtype", dtype]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    return round(float(done.stdout), 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--provider", choices=LOSSES, required=True)
    parser.add_argument("--N", type=int, required=True)
    parser.add_argument("--D", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    arguments = parser.parse_args()
    print(measure(**vars(arguments)))
