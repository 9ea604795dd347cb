"""Peak memory of one forward and backward pass in a process of its own: prints MiB beyond inputs and gradients.

python -m benchmarks.peak_memory --provider fastclip --N 4096 --D 512 --dtype float32
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.contrastive import LOSSES, features


def _status(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return float(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {name}: peak memory is measured on Linux only")


def measure(provider: str, N: int, D: int, dtype: str) -> float:
    """MiB of peak memory beyond the features and their gradients, in this process."""
    loss = LOSSES[provider]
    scale = torch.tensor(20.0, requires_grad=True)
    for size in (8, N):  # the small one loads libraries and starts threads
        image, text = features(size, D, dtype)
        image.grad, text.grad = torch.ones_like(image), torch.ones_like(text)  # touched: part of the base line
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from now
        before = _status("VmRSS")
        image.grad = text.grad = None
        loss(image, text, scale).backward()
    return _status("VmHWM") - before


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
