"""Go through folders without what is hidden, and open files, but no pipes and devices."""

from __future__ import annotations

import logging
import os
import stat
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import AnyStr, BinaryIO
from urllib.parse import unquote, urlsplit

__all__ = [
    "compression",
    "existing",
    "file_stamp",
    "file_state",
    "is_hidden",
    "log_links",
    "open_file",
    "read_file",
    "subfolders",
    "tar_files",
    "walk",
]

logger = logging.getLogger(__name__)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"(\xb5/\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip"}


def is_hidden(name: str | bytes) -> bool:
    """Return True for the name of a file or folder that begins with a dot, as macOS's ``._`` files do."""
    return os.fsencode(name).startswith(b".")


def walk(
    folder: AnyStr, exclude: Collection[str] = (), links: list[AnyStr] | None = None
) -> Iterator[tuple[AnyStr, list[os.DirEntry[AnyStr]]]]:
    """Every folder from `folder` down, and the entries in it that are no folders, sorted by name.

    What is hidden is left out. So are links to folders, which may lead round in circles: the log counts them and names
    the first. The log also names folders that cannot be listed.

    Args:
        exclude: names of folders that are left out.
        links: gets the links to folders, which the log does not count then; `log_links` does.

    Raises:
        OSError: `folder` itself cannot be listed.
    """
    left_out = {os.fsencode(name) for name in exclude}
    folders, linked = [folder], list[AnyStr]() if links is None else links
    while folders:
        here = folders.pop()
        try:
            with os.scandir(here) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if here == folder:
                raise
            logger.warning("skipped: %s: %s", os.fsdecode(here), error.strerror)
            continue
        files, below = [], []
        for entry in inside:
            name = os.fsencode(entry.name)
            if is_hidden(name):
                continue
            if not _is_folder(entry):
                files.append(entry)
            elif entry.is_symlink():
                linked.append(entry.path)
            elif name not in left_out:
                below.append(entry.path)
        folders += reversed(below)
        yield here, files
    if links is None:
        log_links(folder, linked)


def tar_files(folder: Path) -> list[Path]:
    """Return the ``*.tar`` in a folder, sorted, without what is hidden, and folders.

    A link to nothing is one of them: it is a file that is missing.
    """
    return sorted((path for path in folder.glob("*.tar") if not is_hidden(path.name) and not path.is_dir()), key=str)


def subfolders(folder: str | Path) -> list[str]:
    """Return the names of the folders in a folder, and of links to folders, sorted, without what is hidden."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not is_hidden(entry.name) and _is_folder(entry))


def log_links(folder: AnyStr, links: Sequence[AnyStr]) -> None:
    """Count the links in `folder` that `walk` has passed over, and name the first."""
    if links:
        first = os.fsdecode(links[0])
        logger.warning("%s: %d links to folders are not followed, first %s", os.fsdecode(folder), len(links), first)


def _is_folder(entry: os.DirEntry[AnyStr]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, for instance, of which the error says more when it is opened
        return False


def open_file(path: str | Path, *, buffering: int = -1) -> BinaryIO:
    """Open a file for reading, at once: a pipe, which waits for a writer, is refused, and so is a device.

    Raises OSError.
    """
    opened: BinaryIO = open(path, "rb", buffering, opener=_at_once)  # noqa: SIM115 - the caller closes it
    if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
        opened.close()
        raise OSError(f"{path} is a pipe or a device, not a file")
    return opened


def read_file(path: str | Path) -> bytes:
    """Return what a file holds. Raises as `open_file`."""
    with open_file(path) as opened:
        return opened.read()


def existing(folder: Path, name: str) -> Path | None:
    """The file of this name, or of one that differs in its Unicode form, its slashes or the case of its suffix only."""
    if name.startswith("file://"):
        name = unquote(urlsplit(name).path)
    if os.path.exists(folder / name):  # which takes names that are too long for the system
        return folder / name
    # cameras write .JPG, Windows \ and macOS an accent as a character of its own
    stem, suffix = os.path.splitext(name)
    others = [stem + suffix.lower(), stem + suffix.upper(), name.replace("\\", "/")]
    others += [unicodedata.normalize(form, name) for form in ("NFC", "NFD") if not name.isascii()]
    return next((folder / other for other in others if other != name and os.path.exists(folder / other)), None)


def file_stamp(path: str | Path) -> str:
    """Return what changes when another file is there, or one where none was: place, size and time."""
    try:
        state = os.stat(path)
    except (OSError, ValueError):
        return f"{os.path.abspath(path)}: none"
    return f"{os.path.abspath(path)}: {file_state(state)}"


def file_state(state: os.stat_result) -> str:
    """Return what changes when a file is written: size and time. Other rights, or a copy that keeps times, are none."""
    return f"{state.st_size} bytes of {state.st_mtime_ns}"


def compression(head: bytes) -> str:
    """Return the name of the compression of a file that begins so, or ""."""
    return next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), "")


def _at_once(path: str, flags: int) -> int:
    # else opening a pipe waits for a writer, perhaps for ever; Windows has no such flag
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
