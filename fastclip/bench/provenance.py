"""Machine and versions that are recorded in every row of a benchmark."""

from __future__ import annotations

import datetime
import os
import platform
from typing import Any

import torch

from fastclip._backends.cpu import native
from fastclip._version import __version__
from fastclip.system.installed import installed_version
from fastclip.system.machine import nvidia_smi, processor

__all__ = ["about_cpu", "about_gpu"]


def about_cpu(commit: str = "") -> dict[str, Any]:
    """Return the machine and the versions for rows measured on a CPU. `commit` is the commit of the sources."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "isa": native.build() if native.missing() is None else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastclip": __version__,
        "open_clip": installed_version("open_clip_torch"),
    }


def about_gpu(commit: str = "") -> dict[str, Any]:
    """Return the machine and the versions for rows measured on the current GPU. `commit` is that of the sources."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "gpu": torch.cuda.get_device_name(),
        "driver": (nvidia_smi("driver_version") or [""])[0],
        "cuda": torch.version.cuda or "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed_version("triton"),
        "fastclip": __version__,
        "open_clip": installed_version("open_clip_torch"),
    }
