"""Folders that several tests read, each made once a run by the process of pytest-xdist that asks first."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

_run: Path | None = None  # of all processes


def begin(factory: pytest.TempPathFactory, *, beside_others: bool) -> None:
    """Choose where `once` keeps what it makes, for this process."""
    global _run
    folder = factory.getbasetemp()  # of a process of pytest-xdist it lies in that of all
    _run = folder.parent if beside_others else folder


def once(name: str, make: Callable[[Path], object]) -> Path:
    """Return the folder that `make` filled, once a run. Tests only read it.

    Where `make` raises, every later caller fails at once and is told why.
    """
    assert _run is not None
    place = _run / "once" / name
    made, failed = (place.with_name(f"{name}.{end}") for end in ("made", "failed"))
    place.parent.mkdir(exist_ok=True)
    with FileLock(place.with_name(f"{name}.lock")):
        if failed.exists():
            pytest.fail(f"{name!r} was not made:\n{failed.read_text()}", pytrace=False)
        if not made.exists():
            shutil.rmtree(place, ignore_errors=True)  # of a process that was killed
            place.mkdir()
            try:
                make(place)
            except BaseException:  # a test's timeout, too
                failed.write_text(traceback.format_exc())
                raise
            made.touch()
    return place
