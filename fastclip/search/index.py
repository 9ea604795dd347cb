"""An index of images in SQLite: which image each file contains, and the unit vector of each distinct image.

An image is identified by a hash of the file's bytes, so that copies of a file count as one image, a "content" in the
code. An image stays in the index after the last file that contains it is gone (2 KB for 512 dimensions). Files that
were moved, or that are on a disk that was absent for a while, are therefore not embedded again. Paths are bytes,
as the operating system has them. Folders are given without a trailing slash.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Index", "Pictures", "Seen"]

Vector = npt.NDArray[np.float32]

_APPLICATION = 0x66636C70  # "fclp"
_VERSION = 1
_PATIENCE = 60.0  # seconds that a process waits for the transaction of another
# A vector of 512 numbers fills half of SQLite's default page of 4 KiB, and the other half would stay unused.
_PAGE = 16384
_AT_ONCE = 65536  # vectors read at a time: other processes cannot write during a read
_MAPPED = 2**40  # bytes, more than any index has: mapped pages are read without a copy
_TABLES = """
CREATE TABLE contents (id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, vector BLOB, fault TEXT,
                       CHECK ((vector IS NULL) != (fault IS NULL)));
CREATE TABLE files (path BLOB PRIMARY KEY, stamp TEXT, content INTEGER NOT NULL REFERENCES contents) WITHOUT ROWID;
CREATE INDEX files_of_content ON files (content);
CREATE TABLE texts (text BLOB PRIMARY KEY, vector BLOB NOT NULL);
"""
_READER = "CREATE TABLE IF NOT EXISTS reader (name TEXT NOT NULL)"  # indices of older versions may lack this table
_INSIDE = "path >= ? AND path < ?"  # condition for the files under a folder, with the bounds of `_range`
_USED = f"vector IS NOT NULL AND id IN (SELECT content FROM files WHERE {_INSIDE})"
_SLASH = os.fsencode(os.sep)


class Seen(NamedTuple):
    """A file that was read. If its content is new, it has a vector or a fault."""

    path: bytes
    stamp: str | None  # size and times of the file; None if they might stay the same at a further change
    digest: bytes  # hash of the content
    vector: Vector | None = None  # (D,)
    fault: str | None = None  # why the content cannot be used


class Pictures(NamedTuple):
    """The N files of a folder, sorted by path, and their M distinct contents."""

    paths: list[bytes]
    rows: npt.NDArray[np.int64]  # (N,) row of each file in `contents` and `vectors`
    contents: npt.NDArray[np.int64]  # (M,) ids, ascending
    vectors: Vector  # (M, D) unit vectors


class Index:
    """Index of the vectors of one model. Each method is a separate transaction.

    Several processes may use an index at once. Several threads may use one object, but only one at a time.

    Raises:
        ValueError: the file is not a search index, is damaged, was written by another version, or holds vectors of
            different or invalid lengths. The message names the file.
        OSError: the file cannot be read or written, or another process has been writing for a minute. The message names
            the file.

    All methods raise the same errors.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._width: int | None = None  # bytes per vector, the same for all vectors of a model
        file.parent.mkdir(parents=True, exist_ok=True)
        with self._named():  # explicit transactions; the engine's lock keeps threads apart
            self._connection = sqlite3.connect(file, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
        try:
            self._run(f"PRAGMA page_size = {_PAGE}")  # has an effect only before the first table exists
            self._run(f"PRAGMA mmap_size = {_MAPPED}")
            if self._number("PRAGMA user_version") == 0:
                self._make()
            if (self._number("PRAGMA application_id"), self._number("PRAGMA user_version")) != (_APPLICATION, _VERSION):
                raise ValueError(f"{file} is a search index of another version: remove it, and the index is rebuilt")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection to the database."""
        self._connection.close()

    def stamps(self, folder: bytes) -> dict[bytes, str | None]:
        """Return the path and stamp of each file under a folder."""
        return dict(self._rows(f"SELECT path, stamp FROM files WHERE {_INSIDE}", _range(folder)))

    def digests(self) -> dict[bytes, str | None]:
        """Return the digest of each content, with the reason if it cannot be used, else None."""
        return dict(self._rows("SELECT digest, fault FROM contents"))

    def add(self, seen: Sequence[Seen]) -> None:
        """Add files with their contents: all of them or, if the process dies, none."""
        with self._writing():
            for file in seen:
                if file.vector is not None or file.fault is not None:
                    vector = None if file.vector is None else file.vector.astype("<f4").tobytes()
                    row = (file.digest, vector, file.fault)  # another process may have added it first
                    self._run("INSERT OR IGNORE INTO contents (digest, vector, fault) VALUES (?, ?, ?)", row)
                self._run(
                    "INSERT OR REPLACE INTO files SELECT ?, ?, id FROM contents WHERE digest = ?",
                    (file.path, file.stamp, file.digest),
                )

    def remove(self, paths: Iterable[bytes]) -> None:
        """Remove files. Their contents stay."""
        with self._writing():
            for path in paths:
                self._run("DELETE FROM files WHERE path = ?", (path,))

    def forget_faults(self, reader: str) -> None:
        """Remove faults that another image reader reported, together with their files, which are then read again.

        Args:
            reader: description of the current reader of images, such as its version.
        """
        has_reader = self._number("SELECT COUNT(*) FROM sqlite_master WHERE name = 'reader'")
        if has_reader and list(self._rows("SELECT name FROM reader")) == [(reader,)]:
            return
        with self._writing():
            self._run(_READER)
            self._run("DELETE FROM files WHERE content IN (SELECT id FROM contents WHERE fault IS NOT NULL)")
            self._run("DELETE FROM contents WHERE fault IS NOT NULL")
            self._run("DELETE FROM reader")
            self._run("INSERT INTO reader VALUES (?)", (reader,))

    def faults(self, folder: bytes) -> list[tuple[bytes, str]]:
        """Return the path and reason of each file under a folder whose content cannot be used, sorted by path."""
        known = "SELECT path, fault FROM files JOIN contents ON id = content"
        return list(self._rows(f"{known} WHERE {_INSIDE} AND fault IS NOT NULL ORDER BY path", _range(folder)))

    def count(self, folder: bytes) -> int:
        """Return the number of files under a folder."""
        return self._number(f"SELECT COUNT(*) FROM files WHERE {_INSIDE}", _range(folder))

    def paths(self, folder: bytes) -> list[tuple[bytes, int]]:
        """Return the path and content id of each usable file under a folder, sorted by path."""
        known = "SELECT path, content FROM files JOIN contents ON id = content"
        return list(self._rows(f"{known} WHERE {_INSIDE} AND fault IS NULL ORDER BY path", _range(folder)))

    def pictures(self, folder: bytes) -> Pictures:
        """Return all usable files under a folder with their vectors."""
        with self._reading():  # two statements must see the same state
            files = list(self._rows(f"SELECT path, content FROM files WHERE {_INSIDE} ORDER BY path", _range(folder)))
            ids = np.fromiter((content for _, content in files), np.int64, len(files))
            contents, vectors = self._vectors(folder, len(np.unique(ids)))
        usable = np.isin(ids, contents)
        paths = [path for (path, _), used in zip(files, usable.tolist()) if used]
        return Pictures(paths, np.searchsorted(contents, ids[usable]), contents, vectors)

    def vectors_after(self, content: int) -> Iterator[tuple[npt.NDArray[np.int64], Vector]]:
        """Yield blocks of ids (M,) and vectors (M, D) of all contents with an id above `content`, in ascending order.

        Other processes may write between two blocks.
        """
        query = "SELECT id, vector FROM contents WHERE id > ? AND vector IS NOT NULL ORDER BY id LIMIT ?"
        while rows := list(self._rows(query, (content, _AT_ONCE))):
            content = rows[-1][0]
            yield np.array([number for number, _ in rows]), np.stack([self._decoded(data) for _, data in rows])

    def vector_of(self, content: int) -> Vector | None:
        """Return the vector (D,) of a content id, or None."""
        return self._vector("SELECT vector FROM contents WHERE id = ?", content)

    def digest_of(self, content: int) -> bytes:
        """Return the digest of a content id, or b"" if there is no such content."""
        row = next(self._rows("SELECT digest FROM contents WHERE id = ?", (content,)), (b"",))
        return bytes(row[0])

    def vector_of_digest(self, digest: bytes) -> Vector | None:
        """Return the vector (D,) of the content with this digest, or None."""
        return self._vector("SELECT vector FROM contents WHERE digest = ?", digest)

    def vector_of_text(self, text: str) -> Vector | None:
        """Return the vector (D,) that `keep_text` stored for a text, or None."""
        return self._vector("SELECT vector FROM texts WHERE text = ?", _bytes(text))

    def keep_text(self, text: str, vector: Vector) -> None:
        """Store the vector (D,) of a text."""
        with self._writing():
            self._run("INSERT OR REPLACE INTO texts VALUES (?, ?)", (_bytes(text), vector.astype("<f4").tobytes()))

    def changes(self) -> int:
        """Return a number that changes when another process has written to the index."""
        return self._number("PRAGMA data_version")

    def _make(self) -> None:
        with self._writing():
            if self._number("PRAGMA user_version") == 0:  # otherwise another process was first
                # A database without a version that has tables belongs to another program
                if self._number("SELECT COUNT(*) FROM sqlite_master"):
                    raise ValueError(f"{self.file} is not a search index: remove it to build one")
                for statement in _TABLES.split(";")[:-1]:
                    self._run(statement)
                self._run(f"PRAGMA application_id = {_APPLICATION}")
                self._run(f"PRAGMA user_version = {_VERSION}")

    def _vectors(self, folder: bytes, most: int) -> tuple[npt.NDArray[np.int64], Vector]:
        """Return ids (M,) and vectors (M, D) of a folder in the order of the ids, which is the order on disk.

        The vectors are copied from SQLite directly into the rows of the result: a list of a million vectors would need
        twice the memory.

        Args:
            most: upper limit of M.
        """
        contents, vectors = np.empty(most, np.int64), np.empty((0, 0), np.float32)
        into, width, row = memoryview(b""), 0, 0
        rows = self._rows(f"SELECT id, vector FROM contents WHERE {_USED} ORDER BY id", _range(folder))
        for row, (number, data) in enumerate(rows, 1):
            self._check(data)
            if row == 1:
                width = len(data)
                vectors = np.empty((most, width // 4), "<f4")
                into = vectors.data.cast("B")
            contents[row - 1] = number
            into[(row - 1) * width : row * width] = data
        return contents[:row], vectors[:row]

    def _vector(self, query: str, key: object) -> Vector | None:
        row = next(self._rows(query, (key,)), (None,))
        return None if row[0] is None else self._decoded(row[0])

    def _decoded(self, data: Any) -> Vector:
        self._check(data)
        return np.frombuffer(data, "<f4")

    def _check(self, data: Any) -> None:
        """Raise ValueError unless `data` is a vector of the same length as the first one that was read."""
        if not isinstance(data, bytes) or not data or len(data) % 4 or len(data) != (self._width or len(data)):
            raise ValueError(
                f"{self.file} holds a vector of another length or type: remove it, and the index is rebuilt"
            )
        self._width = len(data)

    def _number(self, query: str, values: Sequence[object] = ()) -> int:
        return int(next(self._rows(query, values))[0])

    def _rows(self, query: str, values: Sequence[object] = ()) -> Iterator[Any]:
        with self._named():
            yield from self._connection.execute(query, values)

    def _run(self, query: str, values: Sequence[object] = ()) -> None:
        with self._named():
            self._connection.execute(query, values)

    @contextmanager
    def _writing(self, begin: str = "BEGIN IMMEDIATE") -> Iterator[None]:
        self._run(begin)  # BEGIN IMMEDIATE waits for other writers here rather than in the middle
        try:
            yield
            self._run("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                self._connection.rollback()
            raise

    def _reading(self) -> AbstractContextManager[None]:
        return self._writing("BEGIN")

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Convert errors of SQLite into the errors that the class documents."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise OSError(f"{self.file}: {error}") from error
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"{self.file} cannot be used as a search index ({error}): remove it, and the index is rebuilt"
            ) from error


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # text from a command line need not be valid UTF-8


def _range(folder: bytes) -> tuple[bytes, bytes]:
    """Return the bounds of the paths under a folder: its name followed by "/", and by the byte after "/"."""
    start = folder.rstrip(b"/\\") + _SLASH
    return start, start[:-1] + bytes([start[-1] + 1])
