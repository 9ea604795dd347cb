"""Folders that several tests read, each built once per run by the process of pytest-xdist that needs it first."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

_run: Path | None = None  # shared by all processes


def begin(factory: pytest.TempPathFactory, *, beside_others: bool) -> None:
    """Choose the folder in which `once` stores its results, for this process."""
    global _run
    folder = factory.getbasetemp()  # the folder of a pytest-xdist process lies inside the common one
    _run = folder.parent if beside_others else folder


def once(name: str, make: Callable[[Path], object]) -> Path:
    """Return the folder that `make` filled once in this run. Tests only read it.

    If `make` raises, every later caller fails at once with the reason.
    """
    assert _run is not None
    place = _run / "once" / name
    made, failed = (place.with_name(f"{name}.{end}") for end in ("made", "failed"))
    place.parent.mkdir(exist_ok=True)
    with FileLock(place.with_name(f"{name}.lock")):
        if failed.exists():
            pytest.fail(f"{name!r} was not made:\n{failed.read_text()}", pytrace=False)
        if not made.exists():
            shutil.rmtree(place, ignore_errors=True)  # left by a process that was killed
            place.mkdir()
            try:
                make(place)
            except BaseException:  # a test's timeout included
                failed.write_text(traceback.format_exc())
                raise
            made.touch()
    return place
