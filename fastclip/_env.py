"""Every environment variable the package reads.

FASTCLIP_BACKEND       backend to use where `backend=` is not given, e.g. ``cpu`` or ``reference``
FASTCLIP_CPU_ISA       ``avx512``, ``avx2`` or ``portable`` in place of the best that the processor runs
FASTCLIP_WORKSPACE_MB  bound on a backend's buffers of logits, in MiB (64 on a CPU, 1024 on a GPU)
"""

from __future__ import annotations

import os

__all__ = ["backend", "cpu_isa", "workspace_bytes"]


def backend() -> str | None:
    return os.environ.get("FASTCLIP_BACKEND") or None


def cpu_isa() -> str:
    return os.environ.get("FASTCLIP_CPU_ISA") or "auto"


def workspace_bytes(default: int = 64) -> int:
    """`default` in MiB."""
    text = os.environ.get("FASTCLIP_WORKSPACE_MB") or str(default)
    try:
        megabytes = float(text)
    except ValueError:
        megabytes = 0.0
    if not 0 < megabytes < 2**20:
        raise ValueError(f"FASTCLIP_WORKSPACE_MB must be a number of MiB above 0, got {text!r}")
    return int(megabytes * 2**20)
