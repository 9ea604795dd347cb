"""A store of what tests build: folders under build/stored, named by a digest of all that goes into them.

Sources that did not change are not built again, neither by another test nor by another process of pytest-xdist. Tests
only read what is stored.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from filelock import FileLock

from support import ROOT

KEPT = 2  # builds of a name: those that were used last


def sources(*names: str) -> list[Path]:
    """The files of these folders and files of the repository, without what is built or cached among them."""
    found: set[Path] = set()
    for path in (ROOT / name for name in names):
        found.update(file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
    return sorted(path for path in found if not _is_built(path))


def _is_built(path: Path) -> bool:
    return path.suffix == ".so" or path.name.endswith("_build_report.txt") or "__pycache__" in path.parts


def stored(
    name: str, files: Iterable[Path], options: object, make: Callable[[Path, Path], None], *, root: Path = ROOT
) -> Path:
    """The folder that `make` fills unless there is one already, of the same name, files and options.

    Whoever asks for the same name waits until it is there. Where `make` raises nothing is stored.

    Args:
        files: what is read, below `root`. The file that `make` is written in counts as well, unasked.
        options: what else decides on the result, as anything whose `repr` says all; Python's version is added.
        make: is called with a copy of `files`, which may be edited under it meanwhile, and an empty folder to fill.
    """
    files = sorted({*files})
    makers = hashlib.sha256(Path(make.__code__.co_filename).read_bytes()).hexdigest()
    about = repr((makers, sys.version, platform.machine(), options))
    digest = _digest(about, files, root)
    shelf = root / "build" / "stored" / name
    place = shelf / digest
    shelf.mkdir(parents=True, exist_ok=True)
    with FileLock(shelf / "lock"):
        if not place.is_dir():
            with tempfile.TemporaryDirectory(dir=shelf) as half:
                source, made = Path(half, "source"), Path(half, "made")
                copies = [copy(path, source / path.relative_to(root)) for path in files]
                assert _digest(about, copies, source) == digest, f"{name}: the sources changed, please try again"
                made.mkdir()
                make(source, made)
                made.rename(place)
        os.utime(place)
        _remove_old(shelf)
    return place


def copy(path: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(path, target))


def copy_sources(files: Iterable[Path], folder: Path) -> Path:
    """These files of the repository in `folder`, each at its place."""
    for path in files:
        copy(path, folder / path.relative_to(ROOT))
    return folder


def _digest(about: str, files: list[Path], root: Path) -> str:
    digest = hashlib.sha256(about.encode())
    for path in files:
        for part in (str(path.relative_to(root)).encode(), path.read_bytes()):
            digest.update(hashlib.sha256(part).digest())  # of one length: no end of one is the beginning of another
    return digest.hexdigest()[:16]


def _remove_old(shelf: Path) -> None:
    """Remove all but the builds that were used last; with them the halves of processes that died."""
    folders = sorted((path for path in shelf.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime_ns)
    builds = [path for path in folders if len(path.name) == 16]
    for path in {*folders} - {*builds[-KEPT:]}:
        shutil.rmtree(path)
