"""The cores that a process may use, and the load on them. This must not import torch: callers run before it loads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["contended", "group_limits", "read_lines", "usable_cores"]

_CGROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_SIBLINGS = Path("/sys/devices/system/cpu/smt/active")


def usable_cores() -> float:
    """Return the number of cores this process may use, within the limits of its affinity and its container."""
    cores: float = _allowed_cores()
    for text in group_limits("cpu.max", "", ""):
        quota, period = text.split()
        if quota != "max":
            cores = min(cores, int(quota) / int(period))
    return cores


def contended(threads: int | None, processes: int = 1) -> bool:
    """Return True if threads outnumber the cores.

    The threads are those of `processes` processes like this one, plus those of other programs, which are estimated from
    the load average.

    Args:
        threads: threads per process. None means one per core that the affinity allows, as torch's OpenMP does.
    """
    if threads is None:
        # With two hardware threads per core, torch uses one of them
        siblings = any(line == "1" for line in read_lines(_SIBLINGS))
        threads = max(1, _allowed_cores() // 2 if siblings else _allowed_cores())
    if threads == 1:
        return False
    try:
        # The load of the last minute, scaled by the share of the machine's cores that this process may use
        others = os.getloadavg()[0] * usable_cores() / (os.cpu_count() or 1)
    except (AttributeError, OSError):  # Windows
        others = 0.0
    return threads * processes + others >= usable_cores() + 0.75


def _allowed_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def group_limits(v2: str, controller: str, v1: str) -> Iterator[str]:
    """Yield the first line of the file `v2` in each control group of this process, or of `v1` for version 1 groups."""
    for line in read_lines(_OWN_GROUPS):
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", controller):
            continue
        base, name = (_CGROUPS / controller, v1) if controllers else (_CGROUPS, v2)
        inner = Path(path.lstrip("/"))
        for folder in (inner, *inner.parents):  # the last of them is base itself
            yield from read_lines(base / folder / name)[:1]


def read_lines(path: Path) -> list[str]:
    """Return the lines of a system file, or an empty list if it does not exist."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
