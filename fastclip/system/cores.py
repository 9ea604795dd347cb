"""The cores that a process may use, and whether others are on them. Imports no torch, which reads some of this."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["contended", "group_limits", "read_lines", "usable_cores"]

_CGROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_SIBLINGS = Path("/sys/devices/system/cpu/smt/active")


def usable_cores() -> float:
    """Return the cores this process may keep busy: the machine's, less what affinity or a container leaves out."""
    cores: float = _allowed_cores()
    for text in group_limits("cpu.max", "", ""):
        quota, period = text.split()
        if quota != "max":
            cores = min(cores, int(quota) / int(period))
    return cores


def contended(threads: int | None, processes: int = 1) -> bool:
    """Return True if threads outnumber cores: those of `processes` like this one, and of others, by the load average.

    Args:
        threads: of a process; None: one for each core that its affinity allows, as torch's OpenMP has them.
    """
    if threads is None:
        siblings = any(line == "1" for line in read_lines(_SIBLINGS))  # two threads a core, of which torch takes one
        threads = max(1, _allowed_cores() // 2 if siblings else _allowed_cores())
    if threads == 1:
        return False
    try:
        others = (
            os.getloadavg()[0] * usable_cores() / (os.cpu_count() or 1)
        )  # of the last minute, as many of them as of the cores
    except (AttributeError, OSError):  # Windows
        others = 0.0
    return threads * processes + others >= usable_cores() + 0.75


def _allowed_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1


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
    """Return the lines of a file of the system; none if there is no such file."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
