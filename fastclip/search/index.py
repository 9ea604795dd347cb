"""An index of a disk's pictures in SQLite: which content each file has, and the unit vector of each content.

A content is known by a hash of its bytes and stays when its last file is gone, 2 KB at 512 numbers: what was moved, or
comes back with a disk, is not embedded again. Paths are bytes, as the system has them; folders end without a slash.
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
_PATIENCE = 60.0  # seconds that a process waits for another one's transaction
# A row of 512 numbers fills half a page of SQLite's usual 4 KiB, and its other half would be lost.
_PAGE = 16384
_AT_ONCE = 65536  # vectors that are read at a time, as long as no other process can write
_MAPPED = 2**40  # bytes, more than any index has: vectors are read without a copy of each page
_TABLES = """
CREATE TABLE contents (id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, vector BLOB, fault TEXT,
                       CHECK ((vector IS NULL) != (fault IS NULL)));
CREATE TABLE files (path BLOB PRIMARY KEY, stamp TEXT, content INTEGER NOT NULL REFERENCES contents) WITHOUT ROWID;
CREATE INDEX files_of_content ON files (content);
CREATE TABLE texts (text BLOB PRIMARY KEY, vector BLOB NOT NULL);
"""
_READER = "CREATE TABLE IF NOT EXISTS reader (name TEXT NOT NULL)"  # which indices of before may not have
_INSIDE = "path >= ? AND path < ?"  # of a folder: see _range
_USED = f"vector IS NOT NULL AND id IN (SELECT content FROM files WHERE {_INSIDE})"
_SLASH = os.fsencode(os.sep)


class Seen(NamedTuple):
    """A file that was read; a content that is new has a vector or a fault."""

    path: bytes
    stamp: str | None  # of the file's state; None where it may yet change unseen
    digest: bytes
    vector: Vector | None = None
    fault: str | None = None


class Pictures(NamedTuple):
    """N files of a folder, by path, that share M contents."""

    paths: list[bytes]
    rows: npt.NDArray[np.int64]  # (N,) of `vectors`
    contents: npt.NDArray[np.int64]  # (M,) their ids, rising
    vectors: Vector  # (M, D) unit vectors


class Index:
    """One model's index; every method is a transaction of its own.

    It may be used by several processes at once, and by several threads one after the other.

    Raises:
        ValueError: the file is no such index, is damaged, or that of another version, or holds vectors of different
            lengths or of none; it is named. Methods too.
        OSError: it cannot be read or written, or another process has been writing for a minute; it is named. Likewise.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._width: int | None = None  # bytes of a vector: all are of one model
        file.parent.mkdir(parents=True, exist_ok=True)
        with self._named():  # transactions are begun by hand, and threads take turns by the engine's lock
            self._connection = sqlite3.connect(file, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
        try:
            self._run(f"PRAGMA page_size = {_PAGE}")  # counts only before the first table
            self._run(f"PRAGMA mmap_size = {_MAPPED}")
            if self._number("PRAGMA user_version") == 0:
                self._make()
            if (self._number("PRAGMA application_id"), self._number("PRAGMA user_version")) != (_APPLICATION, _VERSION):
                raise ValueError(f"{file} is the search index of another version; remove it to begin anew")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._connection.close()

    def stamps(self, folder: bytes) -> dict[bytes, str | None]:
        """Return the stamps of all files under a folder."""
        return dict(self._rows(f"SELECT path, stamp FROM files WHERE {_INSIDE}", _range(folder)))

    def digests(self) -> dict[bytes, str | None]:
        """Return the digests of all contents, and why they cannot be used, where it is so."""
        return dict(self._rows("SELECT digest, fault FROM contents"))

    def add(self, seen: Sequence[Seen]) -> None:
        """Add all of these or, where the process dies, none."""
        with self._writing():
            for file in seen:
                if file.vector is not None or file.fault is not None:
                    vector = None if file.vector is None else file.vector.astype("<f4").tobytes()
                    row = (file.digest, vector, file.fault)  # a process beside this one may have been first
                    self._run("INSERT OR IGNORE INTO contents (digest, vector, fault) VALUES (?, ?, ?)", row)
                self._run(
                    "INSERT OR REPLACE INTO files SELECT ?, ?, id FROM contents WHERE digest = ?",
                    (file.path, file.stamp, file.digest),
                )

    def remove(self, paths: Iterable[bytes]) -> None:
        with self._writing():
            for path in paths:
                self._run("DELETE FROM files WHERE path = ?", (path,))

    def forget_faults(self, reader: str) -> None:
        """Forget the faults that another reader of pictures has found: their files are as those never seen."""
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
        """Files under a folder whose content cannot be used, by path, and why."""
        known = "SELECT path, fault FROM files JOIN contents ON id = content"
        return list(self._rows(f"{known} WHERE {_INSIDE} AND fault IS NOT NULL ORDER BY path", _range(folder)))

    def count(self, folder: bytes) -> int:
        """Files under a folder."""
        return self._number(f"SELECT COUNT(*) FROM files WHERE {_INSIDE}", _range(folder))

    def paths(self, folder: bytes) -> list[tuple[bytes, int]]:
        """Files under a folder that can be used, by path, and their contents' ids."""
        known = "SELECT path, content FROM files JOIN contents ON id = content"
        return list(self._rows(f"{known} WHERE {_INSIDE} AND fault IS NULL ORDER BY path", _range(folder)))

    def pictures(self, folder: bytes) -> Pictures:
        """Return the files under a folder that can be used, with their vectors."""
        with self._reading():  # two statements, one state
            files = list(self._rows(f"SELECT path, content FROM files WHERE {_INSIDE} ORDER BY path", _range(folder)))
            ids = np.fromiter((content for _, content in files), np.int64, len(files))
            contents, vectors = self._vectors(folder, len(np.unique(ids)))
        usable = np.isin(ids, contents)
        paths = [path for (path, _), used in zip(files, usable.tolist()) if used]
        return Pictures(paths, np.searchsorted(contents, ids[usable]), contents, vectors)

    def vectors_after(self, content: int) -> Iterator[tuple[npt.NDArray[np.int64], Vector]]:
        """Yield ids (M,) above `content`, rising, and vectors (M, D), a block at a time.

        Other processes may write between two blocks.
        """
        query = "SELECT id, vector FROM contents WHERE id > ? AND vector IS NOT NULL ORDER BY id LIMIT ?"
        while rows := list(self._rows(query, (content, _AT_ONCE))):
            content = rows[-1][0]
            yield np.array([number for number, _ in rows]), np.stack([self._decoded(data) for _, data in rows])

    def vector_of(self, content: int) -> Vector | None:
        return self._vector("SELECT vector FROM contents WHERE id = ?", content)

    def digest_of(self, content: int) -> bytes:
        """b"" where there is no such content."""
        row = next(self._rows("SELECT digest FROM contents WHERE id = ?", (content,)), (b"",))
        return bytes(row[0])

    def vector_of_digest(self, digest: bytes) -> Vector | None:
        return self._vector("SELECT vector FROM contents WHERE digest = ?", digest)

    def vector_of_text(self, text: str) -> Vector | None:
        return self._vector("SELECT vector FROM texts WHERE text = ?", _bytes(text))

    def keep_text(self, text: str, vector: Vector) -> None:
        with self._writing():
            self._run("INSERT OR REPLACE INTO texts VALUES (?, ?)", (_bytes(text), vector.astype("<f4").tobytes()))

    def changes(self) -> int:
        """Differs from what it was where another process has written since; changes of this one do not count."""
        return self._number("PRAGMA data_version")

    def _make(self) -> None:
        with self._writing():
            if self._number("PRAGMA user_version") == 0:  # else a process beside this one was first
                if self._number("SELECT COUNT(*) FROM sqlite_master"):  # another program's, which counts no versions
                    raise ValueError(f"{self.file} is no search index; remove it to begin anew")
                for statement in _TABLES.split(";")[:-1]:
                    self._run(statement)
                self._run(f"PRAGMA application_id = {_APPLICATION}")
                self._run(f"PRAGMA user_version = {_VERSION}")

    def _vectors(self, folder: bytes, most: int) -> tuple[npt.NDArray[np.int64], Vector]:
        """Ids (M,) and vectors (M, D) of a folder, in the order in which they lie on the disk; M is at most `most`.

        Bytes go from SQLite to their rows: a list of a million vectors would need the memory twice.
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
        """Raise ValueError unless the data are a vector, as long as the first that was read."""
        if not isinstance(data, bytes) or not data or len(data) % 4 or len(data) != (self._width or len(data)):
            raise ValueError(f"{self.file} holds a vector of another length or kind; remove it to begin anew")
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
        self._run(begin)  # waits for its turn here, and not in the middle
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
        """Errors of SQLite as those that the class promises."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise OSError(f"{self.file}: {error}") from error
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"{self.file} cannot be used as a search index ({error}); remove it to begin anew"
            ) from error


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # what stands on a command line need not be UTF-8


def _range(folder: bytes) -> tuple[bytes, bytes]:
    """Return the bounds of the paths under a folder: its name with "/", and its name with the next byte."""
    start = folder.rstrip(b"/\\") + _SLASH
    return start, start[:-1] + bytes([start[-1] + 1])
