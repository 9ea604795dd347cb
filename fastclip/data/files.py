"""Walk through folders without their hidden entries, and open files, but neither pipes nor devices."""

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
    """Return True if the name of a file or folder begins with a dot, as macOS's ``._`` files do."""
    return os.fsencode(name).startswith(b".")


def walk(
    folder: AnyStr, exclude: Collection[str] = (), links: list[AnyStr] | None = None
) -> Iterator[tuple[AnyStr, list[os.DirEntry[AnyStr]]]]:
    """Yield `folder` and every folder below it, each with its entries that are not folders, sorted by name.

    Hidden files and folders are left out. Links to folders are not followed, because they may form a cycle: the log
    counts them and names the first. The log also names folders that cannot be listed.

    Args:
        exclude: names of folders to leave out.
        links: a list that receives the links to folders. The caller then logs them with `log_links`.

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
    """Return the paths ``*.tar`` in a folder, sorted, without hidden names and folders.

    A broken link is included, so that opening it reports the missing shard.
    """
    return sorted((path for path in folder.glob("*.tar") if not is_hidden(path.name) and not path.is_dir()), key=str)


def subfolders(folder: str | Path) -> list[str]:
    """Return the names of the folders in a folder and of the links to folders, sorted, without hidden names."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not is_hidden(entry.name) and _is_folder(entry))


def log_links(folder: AnyStr, links: Sequence[AnyStr]) -> None:
    """Log the number of links to folders that `walk` has not followed, with the first of them."""
    if links:
        first = os.fsdecode(links[0])
        logger.warning(
            "%s: %d links to folders are not followed; the first is %s", os.fsdecode(folder), len(links), first
        )


def _is_folder(entry: os.DirEntry[AnyStr]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, for example: opening it raises a clearer error
        return False


def open_file(path: str | Path, *, buffering: int = -1) -> BinaryIO:
    """Open a file for reading, without ever waiting for a pipe's writer.

    Raises OSError if the file cannot be opened, or if it is a pipe or a device.
    """
    opened: BinaryIO = open(path, "rb", buffering, opener=_at_once)  # noqa: SIM115 - the caller closes it
    if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
        opened.close()
        raise OSError(f"{path} is a pipe or a device, not a file")
    return opened


def read_file(path: str | Path) -> bytes:
    """Return the content of a file. Raises OSError as `open_file` does."""
    with open_file(path) as opened:
        return opened.read()


def existing(folder: Path, name: str) -> Path | None:
    """Return the path of the file `name` in `folder`, or None if there is none.

    A file whose name differs only in its Unicode normal form, its slashes or the case of its suffix is accepted too.
    """
    if name.startswith("file://"):
        name = unquote(urlsplit(name).path)
    if os.path.exists(folder / name):  # Path.exists would raise for a name that is too long for the system
        return folder / name
    # Cameras write .JPG, Windows writes \, and macOS stores an accent as a separate character.
    stem, suffix = os.path.splitext(name)
    others = [stem + suffix.lower(), stem + suffix.upper(), name.replace("\\", "/")]
    others += [unicodedata.normalize(form, name) for form in ("NFC", "NFD") if not name.isascii()]
    return next((folder / other for other in others if other != name and os.path.exists(folder / other)), None)


def file_stamp(path: str | Path) -> str:
    """Return a text that changes when the file changes, appears or disappears: its path, size and time."""
    try:
        state = os.stat(path)
    except (OSError, ValueError):
        return f"{os.path.abspath(path)}: none"
    return f"{os.path.abspath(path)}: {file_state(state)}"


def file_state(state: os.stat_result) -> str:
    """Return a text that changes when the file is written: its size and modification time.

    A change of permissions, or a copy that keeps the times, leaves the text unchanged.
    """
    return f"{state.st_size} bytes of {state.st_mtime_ns}"


def compression(head: bytes) -> str:
    """Return the name of the compression of a file that begins with the bytes `head`, or "" if there is none."""
    return next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), "")


def _at_once(path: str, flags: int) -> int:
    # Without the flag, opening a pipe waits for a writer, perhaps for ever. Windows has no such flag.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
