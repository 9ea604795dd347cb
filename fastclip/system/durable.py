"""Files and folders that are whole or not there, whenever the process dies or the machine stops.

Everything is written beside its place, as ``.NAME.RANDOM.tmp``, flushed to the disk (fsync) and then renamed. A folder
that is replaced waits meanwhile as ``.NAME.old``.

The names are random because a process's number is no identity: two containers on one disk have the same. So nobody can
tell who writes a half; one that nobody has written to for an hour is taken to be a dead process's.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastclip.system.reading import read_json

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "check_manifest",
    "is_special",
    "mend_folders",
    "mend_files",
    "naming",
    "new_file",
    "new_files",
    "new_folder",
    "remove_folder",
    "set_aside",
    "write_bytes",
    "write_json",
    "write_manifest",
    "write_tensors",
    "write_text",
]

MANIFEST = "manifest.json"
_CHUNK = 2**20  # bytes hashed at a time
_OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}  # which name no file
_ABANDONED = 3600.0  # seconds
_HALF = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.tmp", re.DOTALL)  # as `_beside` names it


def write_text(path: Path, text: str) -> None:
    """Write a text file whole: whatever happens, `path` holds what it held before, or all of `text`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Write a value as JSON for people, whole as `write_text` does."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes, whole as `write_text` does."""
    with new_file(path) as half:
        half.write_bytes(data)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors in safetensors' form, whole as `write_text` does, with the same bytes for the same tensors.

    Raises:
        OSError: the disk is full, or there is no folder for the file; the path is named.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with new_file(path) as half:
        try:
            save_file(dict(tensors), half, metadata=metadata)
        except SafetensorError as error:  # the library's words for an error of the system, without its number
            raise OSError(f"{path} was not written: {error}") from error
        if metadata is not None and len(metadata) > 1:
            _sort_metadata(half)


def _sort_metadata(file: Path) -> None:
    """Put the metadata of a safetensors file in order: the library writes names and values in any."""
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        data = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(data) <= length  # else it would reach into the tensors
        opened.seek(8)
        opened.write(data.ljust(length))


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a name to write under, whose file takes the place of `path` if all goes well, and is removed otherwise.

    The file has the mode that the umask gives, whatever library writes it. Several processes may write `path` at the
    same time: it holds what one of them wrote. A process that is killed leaves its half behind, for `mend_files`. A
    link stays one, and what it leads to is replaced; a pipe or a device is written to as it is.

    Raises:
        OSError: the system's error, with `path` in place of the name that is written under.
    """
    if is_special(path):
        yield path
        return
    whole = Path(os.path.realpath(path)) if path.is_symlink() else path
    half = _beside(whole)
    try:
        with naming(path, half):
            half.touch(exist_ok=False)
            mode = half.stat().st_mode
            yield half
            half.chmod(mode)  # some libraries write files that only their owner can read
            _flush(half)
            os.replace(half, whole)
    except BaseException:
        half.unlink(missing_ok=True)
        raise
    _flush(whole.parent)  # else the new name may be lost where the machine stops


@contextmanager
def naming(path: Path, half: Path | None = None) -> Iterator[None]:
    """Name `path` in an error of its disk, which the system tells without a name, and in one that names `half`."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in _OF_DISKS:
            error.filename = str(path)
        elif half is not None and error.errno is None:  # of a library, which puts the name into its words
            error.args = (str(error).replace(str(half), str(path)),)
        elif half is not None and str(half) in str(error.filename):
            error.filename = str(error.filename).replace(str(half), str(path))
            if error.filename2 is not None:
                del error.filename2  # None would be told as a second name
        raise


def is_special(path: Path) -> bool:
    """Return True for what is there and can be written to only in place: a device, a pipe, ``/dev/stdout``."""
    standard = str(path.parent) in ("/dev", "/dev/fd")  # such as /dev/stdout, which may lead to a file
    return path.exists() and not path.is_dir() and (standard or not path.is_file())


@contextmanager
def new_files(folder: Path) -> Iterator[Path]:
    """Yield a folder whose files take their places in `folder` if all goes well, and are removed otherwise.

    Other files of `folder` stay, and a full disk changes nothing. The names change one after the other: a process that
    is killed in between leaves some of the new files beside old ones.

    Raises:
        OSError: the system's error, with the name in `folder` in place of the one that is written under.
    """
    made = not folder.exists()
    _make(folder)
    for left, _ in _halves(folder, "files"):  # by a process that was killed
        if _is_abandoned(left):
            shutil.rmtree(left, ignore_errors=True)
    half = _beside(folder / "files")
    try:
        with naming(folder, half):
            os.mkdir(half)
            yield half
            _settle(half)
            for file in sorted(half.iterdir()):
                os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(half, ignore_errors=True)
        if made:
            with suppress(OSError):  # it holds something
                folder.rmdir()
    _flush(folder)


def mend_files(folder: Path, *, owned: bool = False) -> None:
    """Remove what processes left that died while they wrote files of `folder`.

    Args:
        owned: no other process writes into the folder, but files that have an owner of their own (`owner.py`);
            what else is younger than an hour stays.
    """
    for half, name in _halves(folder):
        with suppress(OSError):  # its writer was faster, or it may be read only
            ours = owned and not (folder / f".{name}.lock").exists()
            if half.is_file() and (ours or _is_abandoned(half)):
                half.unlink()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill, which takes the place of `path` if all goes well, and is removed otherwise.

    Its files have the mode that the umask gives, whatever library writes them.
    """
    half, old = _beside(path), path.with_name(f".{path.name}.old")
    _make(path.parent)
    half.mkdir()
    try:
        yield half
        _settle(half)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(path, old)  # a folder that holds something cannot be replaced in one step
        os.rename(half, path)
        _flush(path.parent)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        _bring_back(old)
        raise
    shutil.rmtree(old, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Rename a file or a folder to ``aside-NAME``, or ``aside-NAME-2`` where there is one, and return its new path."""
    aside, number = path.with_name(f"aside-{path.name}"), 1
    while aside.exists() or aside.is_symlink():
        number += 1
        aside = path.with_name(f"aside-{path.name}-{number}")
    path.rename(aside)
    return aside


def remove_folder(path: Path) -> None:
    """Remove a folder, of which at no moment half is there under its name."""
    gone = _beside(path)
    os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def mend_folders(parent: Path, names: str) -> None:
    """Tidy up after a process that died while it wrote or removed folders of `names`, such as ``step-*``."""
    for path in parent.glob(f".{names}.old"):
        _bring_back(path)
        shutil.rmtree(path, ignore_errors=True)
    for path, _ in _halves(parent, names):
        shutil.rmtree(path, ignore_errors=True)


def write_manifest(folder: Path) -> None:
    """Write manifest.json, with the size and the SHA-256 of every file of `folder` as they are read back."""
    files = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")


def check_manifest(folder: Path) -> None:
    """Compare every file of a folder with its manifest; each is read once.

    Raises:
        ValueError: a file is missing, has another size or another byte, with its name; or there is no manifest.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise ValueError(f"{folder} is not a checkpoint, or not a whole one: it holds no {MANIFEST}")
    try:
        files = {name: (int(has["bytes"]), str(has["sha256"])) for name, has in read_json(manifest)["files"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{manifest} is damaged: {error}") from error
    for name, (size, digest) in files.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        if (now := file.stat().st_size) != size:  # quick, and before all of it is read
            raise ValueError(f"{file} is damaged: it has {now:,} bytes, and was written with {size:,}")
        if _sha256(file) != digest:
            raise ValueError(f"{file} is damaged: its SHA-256 is not the one it was written with")


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _halves(folder: Path, names: str = "*") -> Iterator[tuple[Path, str]]:
    """Yield what `_beside` has named in `folder`, and for which name; a user's .notes.v2.tmp is none of these."""
    for path in folder.glob(".*.tmp"):
        if (match := _HALF.fullmatch(path.name)) and fnmatchcase(match["name"], names):
            yield path, match["name"]


def _is_abandoned(half: Path) -> bool:
    return time.time() - half.stat().st_mtime > _ABANDONED


def _bring_back(old: Path) -> None:
    """Undo half of a replacement: the old folder gets its name again where no new one has it."""
    path = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
    if old.exists() and not path.exists():
        os.rename(old, path)


def _settle(half: Path) -> None:
    """Flush a folder and all in it to the disk, its files with the mode that the umask gives."""
    mode = half.stat().st_mode & 0o666
    for path in (*half.rglob("*"), half):
        if path.is_file():  # some libraries write files that only their owner can read
            path.chmod(mode)
        _flush(path)


def _make(folder: Path) -> None:
    """Make a folder and those around it, each of which the disk knows before there is something in it."""
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(exist_ok=True)
        _flush(folder.parent)


def _flush(path: Path) -> None:
    """Flush a file's bytes, or the names in a folder, to the disk, where the system can."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # of folders some network file systems say that there is nothing to do
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(handle)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
