"""The hardware of this machine, and the limits on what a process may use."""

from __future__ import annotations

import math
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from fastclip.system.cores import group_limits, read_lines, usable_cores

__all__ = [
    "available_bytes",
    "container_bytes",
    "memory_bytes",
    "nvidia_smi",
    "open_files",
    "processor",
    "shared_memory_bytes",
    "unseen_gpu",
    "usable_cores",
]


def processor() -> str:
    """Return the model name of the processor."""
    for line in read_lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def nvidia_smi(fields: str) -> list[str]:
    """Return nvidia-smi's values of `fields` for torch's first GPU, or an empty list without that program."""
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None) if torch.cuda.is_available() else None
    which = [f"--id=GPU-{str(uuid).removeprefix('GPU-')}"] if uuid else []
    # By uuid, because torch's first GPU need not be nvidia-smi's first: CUDA_VISIBLE_DEVICES may hide some
    command = ["nvidia-smi", *which, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.splitlines()
    return [cell.strip() for cell in lines[0].split(",")] if done.returncode == 0 and lines else []


def unseen_gpu() -> tuple[str, str] | None:
    """Return a description and advice if nvidia-smi lists a GPU that torch does not see, else None."""
    if torch.cuda.is_available() or not (listed := nvidia_smi("name,driver_version")):
        return None
    seen = f"torch sees no GPU, but nvidia-smi lists {listed[0]}, driver {listed[-1]}"
    if torch.version.cuda is None:
        return seen, "install torch's build for CUDA: the installed one is for CPUs only"
    return seen, f"install a driver for CUDA {torch.version.cuda}, or an older torch; check CUDA_VISIBLE_DEVICES"


def memory_bytes() -> float:
    """Return the memory of the machine in bytes, infinite if unknown."""
    return _meminfo("MemTotal")


def container_bytes() -> float:
    """Return the memory that the control groups of this process allow, in bytes, infinite without a limit."""
    limits = (text for text in group_limits("memory.max", "memory", "memory.limit_in_bytes") if text.isdecimal())
    return min((int(text) for text in limits if int(text) < 2**60), default=math.inf)  # v1's "no limit" is 2^63 or so


def available_bytes() -> float:
    """Return the memory that is available without swapping, in bytes, infinite if unknown."""
    return min(_meminfo("MemAvailable"), container_bytes())


def shared_memory_bytes() -> int | None:
    """Return the size of /dev/shm, through which data loaders send batches, in bytes; None if it does not exist."""
    return shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None


def open_files() -> int | None:
    """Return how many files this process may hold open, or None without a limit."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def _meminfo(name: str) -> float:
    for line in read_lines(Path("/proc/meminfo")):
        if line.startswith(f"{name}:"):
            return float(line.split()[1]) * 1024  # the "kB" of this file are KiB
    return math.inf
