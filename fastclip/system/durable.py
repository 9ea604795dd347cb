"""Files and folders that are never seen half-written, even if the process dies or the machine stops during the write.

Everything is written to a temporary name in the same folder, ``.NAME.RANDOM.tmp``, flushed to the disk (fsync) and then
renamed. A folder that is being replaced has the name ``.NAME.old`` until the new one is in place.

The names are random because a process id is not unique: containers that share a disk may use the same id. The writer of
a temporary file therefore cannot be determined. A temporary file that has not changed for an hour is assumed to be
abandoned. In this module, `half` is the path of a temporary file or folder.
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
_OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}  # errors that name no file
_ABANDONED = 3600.0  # seconds without a change, after which a temporary file is abandoned
_HALF = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.tmp", re.DOTALL)  # the names that `_beside` gives


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: at any moment `path` holds either its old content or all of `text`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Write a value as indented JSON, atomically as `write_text` does."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes, atomically as `write_text` does."""
    with new_file(path) as half:
        half.write_bytes(data)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as a safetensors file, atomically as `write_text` does. Equal tensors give equal bytes.

    Raises:
        OSError: the disk is full, or the folder does not exist. The message names the path.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with new_file(path) as half:
        try:
            save_file(dict(tensors), half, metadata=metadata)
        except SafetensorError as error:  # the library reports a system error as text, without its number
            raise OSError(f"{path} was not written: {error}") from error
        if metadata is not None and len(metadata) > 1:
            _sort_metadata(half)


def _sort_metadata(file: Path) -> None:
    """Sort the metadata of a safetensors file by name, because the library writes it in arbitrary order."""
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        data = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(data) <= length  # longer data would overwrite tensors
        opened.seek(8)
        opened.write(data.ljust(length))


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path, whose file replaces `path` when the block ends, or is removed if it raises.

    The file gets the mode that the umask gives, whichever library writes it. Several processes may write `path` at the
    same time: it then holds the complete output of one of them. A killed process leaves its temporary file behind, for
    `mend_files`. If `path` is a link, it is kept, and its target is replaced. Pipes and devices are written in place.

    Raises:
        OSError: the system's error, with `path` in place of the temporary name.
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
    _flush(whole.parent)  # otherwise the new name may be lost if the machine stops


@contextmanager
def naming(path: Path, half: Path | None = None) -> Iterator[None]:
    """Put the name `path` into errors of the disk, which name no file, and into errors that name the file `half`."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in _OF_DISKS:
            error.filename = str(path)
        elif half is not None and error.errno is None:  # raised by a library, which puts the name into its message
            error.args = (str(error).replace(str(half), str(path)),)
        elif half is not None and str(half) in str(error.filename):
            error.filename = str(error.filename).replace(str(half), str(path))
            if error.filename2 is not None:
                del error.filename2  # None would be shown as a second name
        raise


def is_special(path: Path) -> bool:
    """Return True if `path` exists and can be written only in place: a device, a pipe, ``/dev/stdout``."""
    standard = str(path.parent) in ("/dev", "/dev/fd")  # /dev/stdout, for one, may be a link to a file
    return path.exists() and not path.is_dir() and (standard or not path.is_file())


@contextmanager
def new_files(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, whose files move to `folder` when the block ends, or are removed if it raises.

    Other files in `folder` are kept. If the disk is full, `folder` is left unchanged. Files are renamed one after
    another, so a process that is killed in between leaves some new files beside old ones.

    Raises:
        OSError: the system's error, with the name in `folder` in place of the temporary name.
    """
    made = not folder.exists()
    _make(folder)
    for left, _ in _halves(folder, "files"):  # left by a killed process
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
            with suppress(OSError):  # the folder is not empty
                folder.rmdir()
    _flush(folder)


def mend_files(folder: Path, *, owned: bool = False) -> None:
    """Remove temporary files in `folder` that were left by processes that died while they wrote.

    Args:
        owned: declare that no other process writes into the folder. All temporary files are then removed at once,
            except those of files that have a lock beside them (`owner.py`). In all other cases, a temporary file is
            kept for an hour after the last write to it.
    """
    for half, name in _halves(folder):
        with suppress(OSError):  # the writer has just renamed it, or the folder is read-only
            ours = owned and not (folder / f".{name}.lock").exists()
            if half.is_file() and (ours or _is_abandoned(half)):
                half.unlink()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder, which replaces `path` when the block ends, or is removed if it raises.

    Its files get the mode that the umask gives, whichever library writes them.
    """
    half, old = _beside(path), path.with_name(f".{path.name}.old")
    _make(path.parent)
    half.mkdir()
    try:
        yield half
        _settle(half)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(path, old)  # a folder that is not empty cannot be replaced in one step
        os.rename(half, path)
        _flush(path.parent)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        _bring_back(old)
        raise
    shutil.rmtree(old, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Rename a file or a folder to ``aside-NAME``, or ``aside-NAME-2`` if that exists, and return the new path."""
    aside, number = path.with_name(f"aside-{path.name}"), 1
    while aside.exists() or aside.is_symlink():
        number += 1
        aside = path.with_name(f"aside-{path.name}-{number}")
    path.rename(aside)
    return aside


def remove_folder(path: Path) -> None:
    """Remove a folder so that its name never refers to a partly removed folder."""
    gone = _beside(path)
    os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def mend_folders(parent: Path, names: str) -> None:
    """Clean up after processes that died while they wrote or removed folders that match `names`, such as ``step-*``."""
    for path in parent.glob(f".{names}.old"):
        _bring_back(path)
        shutil.rmtree(path, ignore_errors=True)
    for path, _ in _halves(parent, names):
        shutil.rmtree(path, ignore_errors=True)


def write_manifest(folder: Path) -> None:
    """Write manifest.json with the size and the SHA-256 of every file of `folder`, as read back from the disk."""
    files = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")


def check_manifest(folder: Path) -> None:
    """Compare every file of a folder with its manifest. Each file is read once.

    Raises:
        ValueError: a file, which the message names, is missing or differs in size or content, or there is no manifest.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise ValueError(f"{folder} is not a complete checkpoint: it has no {MANIFEST}")
    try:
        files = {name: (int(has["bytes"]), str(has["sha256"])) for name, has in read_json(manifest)["files"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{manifest} is damaged: {error}") from error
    for name, (size, digest) in files.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        if (now := file.stat().st_size) != size:  # quick, so before the file is read
            raise ValueError(f"{file} is damaged: it has {now:,} bytes, but was written with {size:,}")
        if _sha256(file) != digest:
            raise ValueError(f"{file} is damaged: its SHA-256 differs from that in the manifest")


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _halves(folder: Path, names: str = "*") -> Iterator[tuple[Path, str]]:
    """Yield each temporary file in `folder` and the name that its file will get.

    Similarly named files of the user, such as .notes.v2.tmp, are left out.
    """
    for path in folder.glob(".*.tmp"):
        if (match := _HALF.fullmatch(path.name)) and fnmatchcase(match["name"], names):
            yield path, match["name"]


def _is_abandoned(half: Path) -> bool:
    return time.time() - half.stat().st_mtime > _ABANDONED


def _bring_back(old: Path) -> None:
    """Undo an incomplete replacement: give the old folder its name back unless a new one has it."""
    path = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
    if old.exists() and not path.exists():
        os.rename(old, path)


def _settle(half: Path) -> None:
    """Give the files of a folder the mode of the umask, and flush them and the folder to the disk."""
    mode = half.stat().st_mode & 0o666
    for path in (*half.rglob("*"), half):
        if path.is_file():  # some libraries write files that only their owner can read
            path.chmod(mode)
        _flush(path)


def _make(folder: Path) -> None:
    """Create a folder and its parents, and flush the name of each to the disk before anything is created in it."""
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(exist_ok=True)
        _flush(folder.parent)


def _flush(path: Path) -> None:
    """Flush the bytes of a file, or the names in a folder, to the disk, if the system supports it."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems report that folders need no flush
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
