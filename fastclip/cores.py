"""The cores that a process may use, and whether others are on them. Imports no torch, which reads some of this."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["contended", "group_limits", "read_lines", "usable_cores"]

_CGROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_SIBLINGS = Path("/sys/devices/system/cpu/smt/active")


def usable_cores() -> float:
    """Cores this process may keep busy: the machine's, less what its affinity or its container leaves out."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    cores: float = len(affinity(0)) if affinity else os.cpu_count() or 1
    for text in group_limits("cpu.max", "", ""):
        quota, period = text.split()
        if quota != "max":
            cores = min(cores, int(quota) / int(period))
    return cores


def contended(threads: int | None, processes: int = 1) -> bool:
    """Whether threads outnumber cores: those of `processes` like this one, and of the others, by the load average.

    Args:
        threads: of a process; None: one for each core that its affinity allows, as torch's OpenMP has them.
    """
    affinity, machine = getattr(os, "sched_getaffinity", None), os.cpu_count() or 1
    allowed = len(affinity(0)) if affinity else machine
    if threads is None:
        siblings = any(line == "1" for line in read_lines(_SIBLINGS))  # two threads a core, of which torch takes one
        threads = max(1, allowed // 2 if siblings else allowed)
    if threads == 1:
        return False
    try:
        others = os.getloadavg()[0] * usable_cores() / machine  # of the last minute, as many of them as of the cores
    except (AttributeError, OSError):  # Windows
        others = 0.0
    return threads * processes + others >= usable_cores() + 0.75


def group_limits(v2: str, controller: str, v1: str) -> Iterator[str]:
    """Yield the first line of file `v2` (`v1` of a version 1 controller) in each control group around this process."""
    for line in read_lines(_OWN_GROUPS):
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", controller):
            continue
        base, name = (_CGROUPS / controller, v1) if controllers else (_CGROUPS, v2)
        inner = Path(path.lstrip("/"))
        for folder in (inner, *inner.parents):  # the last of them is base itself
            yield from read_lines(base / folder / name)[:1]


def read_lines(path: Path) -> list[str]:
    """Of a file of the system; none where there is no such file."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
