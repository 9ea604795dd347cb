"""What several tests look at is made once a run, by the process of pytest-xdist that asks first; the others wait."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

_run: Path | None = None  # of all processes


def begin(factory: pytest.TempPathFactory, *, beside_others: bool) -> None:
    """Of this process: where `once` keeps what it makes."""
    global _run
    folder = factory.getbasetemp()  # of a process of pytest-xdist it lies in that of all
    _run = folder.parent if beside_others else folder


def once(name: str, make: Callable[[Path], object]) -> Path:
    """The folder that `make` fills, in one process of a run; tests only read it. Where it raises it is asked again."""
    assert _run is not None
    place, made = _run / "once" / name, _run / "once" / f"{name}.made"
    place.parent.mkdir(exist_ok=True)
    with made.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed, or the process dies
        if not made.exists():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            make(place)
            made.touch()
    return place
