"""A store of what tests build: folders under build/stored, named by a digest of all that goes into them.

Sources that did not change are not built again, neither by another test nor by another process of pytest-xdist. Tests
only read what is stored.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from support import ROOT

STORE = ROOT / "build" / "stored"
KEPT = 2  # builds of a name: those that were used last


def sources(*names: str) -> list[Path]:
    """The files of these folders and files of the repository, without what is built or cached among them."""
    found: set[Path] = set()
    for path in (ROOT / name for name in names):
        found.update(file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
    return sorted(path for path in found if not _is_built(path))


def _is_built(path: Path) -> bool:
    return path.suffix == ".so" or path.name.endswith("_build_report.txt") or "__pycache__" in path.parts


def copy(files: Iterable[Path], folder: Path) -> Path:
    """These files of the repository in `folder`, each at its place."""
    for path in files:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return folder


def stored(
    name: str, files: Iterable[Path], options: object, make: Callable[[Path], None], *, store: Path = STORE
) -> Path:
    """The folder that `make` fills, called with an empty one unless there is one of the same name, files and options.

    Whoever asks for the same name waits until it is there. Where `make` raises nothing is stored.

    Args:
        files: what is read. The file that `make` is written in is one of them, unasked.
        options: what else decides on the result, as anything whose `repr` says all; Python's version is added.
    """
    inputs = sorted({*files, Path(make.__code__.co_filename)})
    digest = _digest(inputs, options)
    shelf = store / name
    place = shelf / digest
    shelf.mkdir(parents=True, exist_ok=True)
    with open(shelf / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed, or the process dies
        if not place.is_dir():
            with tempfile.TemporaryDirectory(dir=shelf) as half:
                made = Path(half, "made")
                made.mkdir()
                make(made)
                assert _digest(inputs, options) == digest, f"{name}: its sources changed while it was built"
                made.rename(place)
        os.utime(place)
        _remove_old(shelf)
    return place


def _digest(files: list[Path], options: object) -> str:
    digest = hashlib.sha256(repr((sys.version, platform.machine(), options)).encode())
    for path in files:
        where = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        digest.update(hashlib.sha256(str(where).encode()).digest() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _remove_old(shelf: Path) -> None:
    """Remove all but the builds that were used last; with them the halves of processes that died."""
    folders = sorted((path for path in shelf.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime_ns)
    builds = [path for path in folders if len(path.name) == 16]
    for path in {*folders} - {*builds[-KEPT:]}:
        shutil.rmtree(path)
