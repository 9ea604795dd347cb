"""A store of what tests build: folders under build/stored, named by a digest of all that the build depends on.

Unchanged sources are not built again by another test or another process of pytest-xdist. Tests only read the folders.
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

KEPT = 2  # builds per name, those that were used last


def sources(*names: str) -> list[Path]:
    """Return the given files, and those in the given folders, of the repository, except built or cached ones."""
    found: set[Path] = set()
    for path in (ROOT / name for name in names):
        found.update(file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
    return sorted(path for path in found if not _is_built(path))


def _is_built(path: Path) -> bool:
    return path.suffix == ".so" or path.name.endswith("_build_report.txt") or "__pycache__" in path.parts


def stored(
    name: str, files: Iterable[Path], options: object, make: Callable[[Path, Path], None], *, root: Path = ROOT
) -> Path:
    """Return the folder that `make` fills, unless it exists already for the same name, files and options.

    Other callers with the same name wait until it is complete. If `make` raises, nothing is stored.

    Args:
        files: files to read, below `root`. The file that contains `make` is always added.
        options: everything else that determines the result, in an object's complete `repr`. Python's version is added.
        make: called with a copy of `files`, whose originals may be edited meanwhile, and an empty folder to fill.
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
    """Copy these files of the repository into `folder`, with their relative paths."""
    for path in files:
        copy(path, folder / path.relative_to(ROOT))
    return folder


def _digest(about: str, files: list[Path], root: Path) -> str:
    digest = hashlib.sha256(about.encode())
    for path in files:
        for part in (str(path.relative_to(root)).encode(), path.read_bytes()):
            # digests have equal lengths, so that concatenation is unambiguous
            digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


def _remove_old(shelf: Path) -> None:
    """Remove all builds except the most recently used ones, and the partial ones of dead processes."""
    folders = sorted((path for path in shelf.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime_ns)
    builds = [path for path in folders if len(path.name) == 16]
    for path in {*folders} - {*builds[-KEPT:]}:
        shutil.rmtree(path)
