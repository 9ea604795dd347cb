"""An index whose process dies, that several processes write, or whose file is damaged."""

from __future__ import annotations

import logging
import os
import random
import signal
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest

from support import needs

needs("train")
from fastclip.search import index, scan
from support.colours import QUERY, Colours, check, counts, draw, engine
from support.processes import ended, forked, forks

TRIALS = 100


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat files of the test as old."""
    monkeypatch.setattr(scan, "_SETTLED", 0)


@pytest.mark.parametrize("text", ["", "no database", "SQLite format 3\0" + "x" * 5000])
@pytest.mark.fault("A search index is damaged", "An error names it")
def test_file_that_is_no_index_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "cache" / "search" / "colours.sqlite3"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    if not text:  # a process that dies before it creates the tables leaves an empty file
        return check(engine(tmp_path), [])
    with pytest.raises(ValueError, match=r"colours\.sqlite3 cannot be used .* remove it"):
        engine(tmp_path)


@pytest.mark.fault("The disk is full during indexing", "An error names the index, which keeps what it contained")
def test_disk_that_is_full_and_pages_that_are_damaged_are_named(tmp_path: Path) -> None:
    for k in range(300):
        draw(tmp_path / "photos" / f"{k}.png", k)
    searched = engine(tmp_path)
    index = searched._index
    index._run(f"PRAGMA max_page_count = {index._number('PRAGMA page_count')}")
    with pytest.raises(OSError, match=r"colours\.sqlite3: database or disk is full"):
        searched.update()
    index._run("PRAGMA max_page_count = 1000000")
    assert counts(searched)[0] == 300 and len(searched.find(QUERY, 1000)) == 300
    searched.close()
    size = index.file.stat().st_size
    with index.file.open("r+b") as file:
        file.seek(16384)
        file.write(b"x" * (size - 16384))
    with pytest.raises(ValueError, match=r"colours\.sqlite3 cannot be used .* remove it"):
        engine(tmp_path).update()


def test_index_of_another_version_is_left_alone(tmp_path: Path) -> None:
    searched = engine(tmp_path)
    file = searched._index.file
    searched.close()
    with sqlite3.connect(file) as connection:
        connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(ValueError, match=r"colours\.sqlite3 is a search index of another version"):
        engine(tmp_path)


def stored(tmp_path: Path) -> dict[bytes, bytes]:
    """Return vectors by the digest of their content, after SQLite's own checks of the file."""
    connection = sqlite3.connect(tmp_path / "cache" / "search" / "colours.sqlite3")
    try:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        return dict(connection.execute("SELECT digest, vector FROM contents"))
    finally:
        connection.close()


@forks
@pytest.mark.fault(
    "kill -9 at any moment of indexing", "The index opens, contains what was embedded, and the next search continues it"
)
def test_kill_leaves_an_index_that_goes_on(tmp_path: Path) -> None:
    moments, size = random.Random(0), 40
    photos = [draw(tmp_path / "photos" / f"{k}.png", k) for k in range(size)]
    known: dict[bytes, bytes] = {}
    grown = 0

    def index_for_ever(first: int, told: int) -> None:
        logging.disable()
        for k in range(first, first + 10**6):  # an image is changed, one renamed and one removed during the update
            engine(tmp_path).update(batch_size=3, workers=2)
            if k > first:
                os.write(told, b".")
            draw(photos[k % size], k)
            photos[k % size].rename(tmp_path / "photos" / f"renamed {k % 5}.png")
            photos[(k + 2) % size].unlink(missing_ok=True)

    for trial in range(TRIALS):
        reads, writes = os.pipe()
        pid = forked(lambda first=1000 * (trial + 1), told=writes: index_for_ever(first, told))
        os.close(writes)
        if trial % 2:  # otherwise a busy machine may not have stored anything yet
            assert os.read(reads, 1) == b"."
        os.close(reads)
        time.sleep(moments.uniform(0, 0.08))
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
        engine(tmp_path).close()
        now = stored(tmp_path)
        assert known.items() <= now.items(), f"trial {trial}: something is lost"
        grown += len(now) > len(known)
        known = now
    assert grown > 10  # it was killed while writing
    searched = engine(tmp_path)
    searched.update()
    faulty = {path for path, _ in searched.faults()}  # an image whose writing was interrupted by the kill
    check(searched, [photo for photo in (tmp_path / "photos").iterdir() if str(photo) not in faulty])
    assert counts(searched)[1:] == (0, 0, 0)


@forks
@pytest.mark.fault(
    "Several processes index a folder at the same time", "The index is the same as if one process had written it"
)
def test_processes_that_index_at_once_agree(tmp_path: Path) -> None:
    photos = [draw(tmp_path / "photos" / f"{k}.png", k) for k in range(60)]
    pids = [forked(lambda: void(engine(tmp_path).update(batch_size=2, workers=2))) for _ in range(4)]
    assert [ended(pid) for pid in pids] == [0] * 4
    assert len(stored(tmp_path)) == 60
    searched = engine(tmp_path)
    check(searched, photos)
    assert counts(searched) == (60, 0, 0, 0)


def void(_: object) -> None:
    pass


def test_pictures_that_another_process_adds_are_found(tmp_path: Path) -> None:
    searched = engine(tmp_path)
    check(searched, [])
    photo = draw(tmp_path / "photos" / "a.png", 1)
    engine(tmp_path).update()
    check(searched, [photo])


def test_others_may_write_while_vectors_are_gone_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k in range(8):
        draw(tmp_path / "photos" / f"{k}.png", k)
    engine(tmp_path).update()
    monkeypatch.setattr(index, "_PATIENCE", 0.1)
    monkeypatch.setattr(index, "_AT_ONCE", 3)
    read, written = (index.Index(tmp_path / "cache" / "search" / "colours.sqlite3") for _ in range(2))
    found = []
    for contents, vectors in read.vectors_after(1):
        found += contents.tolist()
        for content, vector in zip(contents.tolist(), vectors):
            assert np.array_equal(vector, read.vector_of(content))
            written.keep_text(f"{content}", vector)
    assert found == list(range(2, 9))
    read.close()
    written.close()


@pytest.mark.fault("Ctrl-C during indexing", "The images embedded so far are kept")
def test_interrupted_indexing_keeps_what_is_embedded(tmp_path: Path) -> None:
    class Stopped(Colours):
        def embed_images(self, images: object) -> object:  # type: ignore[override]
            if self.pictures >= 6:
                raise KeyboardInterrupt
            return super().embed_images(images)  # type: ignore[arg-type]

    for k in range(20):
        draw(tmp_path / "photos" / f"{k}.png", k)
    with pytest.raises(KeyboardInterrupt):
        engine(tmp_path, Stopped()).update(batch_size=3, workers=2)
    assert counts(engine(tmp_path))[1] == 14
