"""An index follows the changes of a folder, and no image is embedded twice."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest

from support import needs

needs("train")
import torch
from PIL import Image

from fastclip.data.faults import BadSample
from fastclip.data.sources.folder import pictures
from fastclip.embedding.query import Term
from fastclip.search import scan
from fastclip.search.engine import SearchEngine
from fastclip.search.index import Index
from support.colours import DIM, QUERY, Colours, check, counts, draw, engine, picture_vector


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat files of the test as old."""
    monkeypatch.setattr(scan, "_SETTLED", 0)


def test_index_follows_the_folder(tmp_path: Path) -> None:
    photos = [draw(tmp_path / "photos" / f"{k % 3}" / f"{k}.png", k) for k in range(10)]
    model = Colours()
    searched = engine(tmp_path, model)
    assert counts(searched, batch_size=4) == (10, 10, 0, 0)
    check(searched, photos)
    assert counts(searched) == (10, 0, 0, 0)
    new = tmp_path / "photos" / "new name.png"
    photos[0].rename(new)
    copy = Path(shutil.copy(photos[1], tmp_path / "photos" / "copy.png"))
    photos[2].unlink()
    draw(photos[3], 300)
    photos[4].touch()
    shutil.move(tmp_path / "photos" / "2", tmp_path / "photos" / "moved")
    moved = [tmp_path / "photos" / "moved" / name for name in ("5.png", "8.png")]
    loaded = model.loaded
    assert counts(searched) == (10, 1, 5, 4)
    assert model.pictures == 11 and model.loaded > loaded
    check(searched, [new, copy, photos[1], photos[3], photos[4], photos[6], photos[7], photos[9], *moved])
    shutil.rmtree(tmp_path / "photos" / "0")  # images that return are not embedded again
    photos[6].parent.mkdir()
    draw(photos[6], 6)
    assert counts(searched)[1] == 0 and model.pictures == 11


def test_renamed_pictures_need_no_model(tmp_path: Path) -> None:
    photos = [draw(tmp_path / "photos" / f"{k}.png", k) for k in range(5)]
    engine(tmp_path).update()
    model = Colours()
    for photo in photos:
        photo.rename(photo.with_suffix(".bmp"))
    assert counts(engine(tmp_path, model)) == (5, 0, 5, 5)
    assert not model.loaded


def test_unchanged_pictures_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k in range(5):
        draw(tmp_path / "photos" / f"{k}.png", k)
    searched = engine(tmp_path)
    searched.update()
    read: list[bytes] = []
    real = scan._read
    monkeypatch.setattr(scan, "_read", lambda path, *rest: (read.append(path), real(path, *rest))[1])
    assert counts(searched) == (5, 0, 0, 0) and not read
    draw(tmp_path / "photos" / "3.png", 9)
    assert counts(searched) == (5, 1, 0, 0) and len(read) == 1


@pytest.mark.parametrize("how", ["replaced", "written"])
@pytest.mark.fault("An image is replaced by an image of the same size and time", "It is embedded again")
def test_change_of_the_same_size_and_time_is_seen(tmp_path: Path, how: str) -> None:
    """A change that keeps size and time is detected. `cp -p` can set back the time of writing, but not
    the time of the status change.
    """
    photo = tmp_path / "photos" / "a.bmp"
    draw(photo, 1)
    searched, before = engine(tmp_path), photo.stat()
    searched.update()
    time.sleep(0.02)  # one tick of the disk's clock
    if how == "written":
        draw(photo, 2)
    else:
        draw(tmp_path / "b.bmp", 2).rename(photo)
    os.utime(photo, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (photo.stat().st_size, photo.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert counts(searched) == (1, 1, 0, 0)
    check(searched, [photo])


def test_file_that_is_new_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new file is read again, because two changes within one tick of the clock leave the same times."""
    photo = draw(tmp_path / "photos" / "a.bmp", 1)
    monkeypatch.setattr(scan, "_SETTLED", 10**12)
    monkeypatch.setattr(scan, "_times", lambda state: (1, 1, 1))
    searched = engine(tmp_path)
    searched.update()
    draw(photo, 2)
    assert counts(searched) == (1, 1, 0, 0)
    check(searched, [photo])


@pytest.mark.fault("An image is written while it is being indexed", "It is named, and read by the next search")
def test_file_that_changes_while_it_is_read_is_left_for_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    photo = draw(tmp_path / "photos" / "a.bmp", 1)
    searched, real = engine(tmp_path), scan.digest_of

    def slow(file: object) -> bytes:
        digest = real(file)  # type: ignore[arg-type]
        draw(photo, 2)
        return digest

    monkeypatch.setattr(scan, "digest_of", slow)
    assert counts(searched) == (1, 0, 0, 0) and "it changed while it was read" in caplog.text
    monkeypatch.setattr(scan, "digest_of", real)
    assert counts(searched) == (1, 1, 0, 0)
    check(searched, [photo])


@pytest.mark.fault(
    "A searched folder contains a damaged or oversized image, or a file that is not an image",
    "It is named once, with the reason, and skipped until it changes",
)
def test_what_cannot_be_read_is_listed_and_not_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "photos"
    good = draw(folder / "good.png", 1)
    (folder / "page.jpg").write_text("<html>")
    (folder / "half.png").write_bytes(draw(tmp_path / "x.png", 2).read_bytes()[:60])
    (folder / "empty.gif").write_bytes(b"")
    Image.new("L", (20_000, 10_000)).save(folder / "huge.png", compress_level=1)
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    model = Colours()
    searched = engine(tmp_path, model)
    done = searched.update()
    assert (done.files, done.embedded) == (5, 1)
    assert {Path(path).name for path, _ in done.skipped} == {"page.jpg", "half.png", "empty.gif", "huge.png"}
    reasons = {Path(path).name: reason for path, reason in searched.faults()}
    assert "too large" in reasons["huge.png"] and "not a readable image" in reasons["page.jpg"]
    assert all(f"skipped: {folder / name}: " in caplog.text for name in reasons)
    assert searched.update().skipped == [] and len(searched.faults()) == 4
    shutil.copy(folder / "page.jpg", folder / "copy.jpg")  # a fault belongs to the content, not to the file
    assert [Path(path).name for path, _ in searched.update().skipped] == ["copy.jpg"]
    draw(folder / "page.jpg", 3)
    assert counts(searched) == (6, 1, 0, 0) and model.pictures == 2
    check(searched, [good, folder / "page.jpg"])


def test_what_another_reader_could_not_read_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = [draw(tmp_path / folder / f"{k}.png", k) for k, folder in enumerate(["photos", "photos", "other"])]
    real = scan.read_picture

    def older(file: object, key: str) -> Image.Image:
        if key != str(photos[0]):
            raise BadSample("not an image", key, "its format is not recognised")
        return real(file, key)  # type: ignore[arg-type]

    monkeypatch.setattr(scan, "read_picture", older)
    searched, other = engine(tmp_path), engine(tmp_path, folder="other")
    assert counts(searched) == (2, 1, 0, 0) and counts(other) == (1, 0, 0, 0)
    monkeypatch.setattr(scan, "read_picture", real)
    assert counts(searched) == (2, 0, 0, 0) and len(searched.faults()) == 1
    connection = sqlite3.connect(searched._index.file)
    connection.execute("DROP TABLE reader")  # as in an index of an older version
    connection.close()
    assert counts(searched) == (2, 1, 0, 0) and searched.faults() == []
    assert counts(other) == (1, 1, 0, 0)
    check(searched, photos[:2])
    (tmp_path / "photos" / "page.png").write_text("<html>")
    assert len(searched.update().skipped) == 1 and not searched.update().skipped
    monkeypatch.setattr(scan, "_reader", lambda: "Pillow 99")
    assert len(searched.update().skipped) == 1 and not searched.update().skipped


@pytest.mark.fault("The disk fails to read an image", "The image is named and tried again by the next search")
def test_fault_of_the_disk_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = [draw(tmp_path / "photos" / f"{k}.png", k) for k in range(2)]
    searched, real = engine(tmp_path), scan.read_picture
    searched.update()
    draw(photos[1], 3)

    def unreadable(file: object, key: str) -> None:
        raise BadSample("unreadable file", key, "...") from OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(scan, "read_picture", unreadable)
    assert searched.update().skipped == [(str(photos[1]), "Input/output error")]
    check(searched, photos[:1])  # not the previous contents
    monkeypatch.setattr(scan, "read_picture", real)
    assert counts(searched) == (2, 1, 0, 0)
    check(searched, photos)


@pytest.mark.fault(
    "The model returns NaN for an image", "The image is named and left out; otherwise every search would find it"
)
def test_numbers_that_are_not_finite_are_never_found(tmp_path: Path) -> None:
    class Overflowing(Colours):
        def embed_images(self, images: torch.Tensor) -> torch.Tensor:
            found = super().embed_images(images)
            return torch.where(images.mean((1, 2, 3))[:, None] == 1, torch.nan, found)

    photos = [draw(tmp_path / "photos" / f"{k}.png", k) for k in range(4)]
    Image.new("RGB", (5, 5), "white").save(tmp_path / "photos" / "white.png")
    searched = engine(tmp_path, Overflowing())
    done = searched.update()
    assert [Path(path).name for path, _ in done.skipped] == ["white.png"] and "finite" in done.skipped[0][1]
    assert (done.embedded, len(searched.faults())) == (4, 1)
    check(searched, photos)
    with pytest.raises(ValueError, match="weights must be finite numbers, got inf, -inf"):
        searched.find([Term(float("inf"), "a"), Term(float("-inf"), "a")])
    with pytest.raises(ValueError, match="the query's vector is too short, too long or not finite"):
        searched.find([Term(1e300, "a")])


def test_model_that_cannot_be_loaded_is_no_fault_of_the_pictures(tmp_path: Path) -> None:
    class Broken(Colours):
        @property
        def embedder(self) -> object:
            raise ValueError("no such weights")

    photo = draw(tmp_path / "photos" / "a.png", 1)
    with pytest.raises(ValueError, match="no such weights"):
        engine(tmp_path, Broken()).update()
    assert counts(engine(tmp_path)) == (1, 1, 0, 0)
    check(engine(tmp_path), [photo])


def test_excluded_folders_are_neither_read_nor_found_nor_forgotten(tmp_path: Path) -> None:
    folder = tmp_path / "node_modules" / "photos"  # parents of the searched folder do not count
    kept = [draw(folder / name, k) for k, name in enumerate(("a.png", "b/c.PNG", "d/d.png", "my.git/e.png"))]
    left = [draw(folder / f"{name}/x/{k}.png", 10 + k) for k, name in enumerate(("@eaDir", "b/node_modules"))]
    model = Colours()
    searched = engine(tmp_path, model, "node_modules/photos")
    assert counts(searched) == (4, 4, 0, 0)
    check(searched, kept)
    every = engine(tmp_path, model, "node_modules/photos", exclude=())
    assert counts(every) == (6, 2, 0, 0)
    check(every, kept + left)
    check(searched, kept)
    # the excluded images stayed in the index
    assert counts(searched) == (4, 0, 0, 0) and counts(every) == (6, 0, 0, 0)
    b_apart = engine(tmp_path, model, "node_modules/photos", exclude=("b",))
    check(b_apart, [kept[0], kept[2], kept[3], left[0]])


def test_hidden_pictures_are_those_that_training_passes_over(tmp_path: Path) -> None:
    names = ("a.png", "._a.png", ".b/b.png", "c/.png", "c/.d.png", "e.f/g.png", "c/.h/i/j.png")
    for k, name in enumerate(names):
        draw(tmp_path / "photos" / f"{k}.png", k).rename(_made(tmp_path / "photos" / name))
    kept = [tmp_path / "photos" / "a.png", tmp_path / "photos" / "e.f" / "g.png"]
    assert [str(tmp_path / "photos" / one.name) for one in pictures(tmp_path / "photos")] == [*map(str, kept)]
    model = Colours()
    assert counts(engine(tmp_path, model)) == (2, 2, 0, 0)
    inside = engine(tmp_path, model, "photos/.b")  # the searched folder itself may be hidden
    assert counts(inside) == (1, 1, 0, 0)
    check(inside, [tmp_path / "photos" / ".b" / "b.png"])
    check(engine(tmp_path, model), kept)
    assert counts(engine(tmp_path, model)) == (2, 0, 0, 0) and counts(inside) == (1, 0, 0, 0)


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_folders_are_apart_and_share_what_is_known(tmp_path: Path) -> None:
    inner = draw(tmp_path / "photos" / "a_b" / "1.png", 1)
    beside = draw(tmp_path / "photos" / "a_b2" / "1.png", 2)
    likewise = draw(tmp_path / "photos" / "aXb" / "1.png", 3)
    model = Colours()
    engine(tmp_path, model).update()
    check(engine(tmp_path, model, "photos/a_b"), [inner])
    assert counts(engine(tmp_path, model, "photos/a_b")) == (1, 0, 0, 0)
    check(engine(tmp_path, model), [inner, beside, likewise])
    (tmp_path / "link").symlink_to(tmp_path / "photos" / "a_b")
    check(engine(tmp_path, model, "link"), [inner])
    (tmp_path / "photos" / "a_b" / "round").symlink_to(tmp_path / "photos")
    assert counts(engine(tmp_path, model))[0] == 3


@pytest.mark.fault("The searched disk is not connected", "An error is raised, and the index is kept")
def test_folder_that_is_gone_empties_no_index(tmp_path: Path) -> None:
    photo = draw(tmp_path / "photos" / "a.png", 1)
    searched = engine(tmp_path)
    searched.update()
    (tmp_path / "photos").rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError):
        searched.update()
    (tmp_path / "away").rename(tmp_path / "photos")
    check(searched, [photo])
    with pytest.raises(NotADirectoryError, match=r"there is no folder .*nowhere"):
        SearchEngine(Colours(), tmp_path / "nowhere", indices=tmp_path)


def test_index_of_another_model_is_kept_apart(tmp_path: Path) -> None:
    photo = draw(tmp_path / "photos" / "a.png", 1)
    one, other = Colours("one"), Colours("other")
    engine(tmp_path, one).update()
    assert engine(tmp_path, other).find(QUERY) == []
    assert counts(engine(tmp_path, other)) == (1, 1, 0, 0) and counts(engine(tmp_path, one)) == (1, 0, 0, 0)
    check(engine(tmp_path, other), [photo])


@pytest.mark.parametrize(
    "name", ["straße 東京 🐈.png", "with\nline.png", "a'b\"c;--.png", os.fsdecode(b"latin\xe9.png")]
)
def test_any_file_name_is_indexed_and_found(tmp_path: Path, name: str) -> None:
    photo = tmp_path / "photos" / name
    try:
        draw(tmp_path / "x.png", 1).rename(photo.parent / name if photo.parent.mkdir() is None else photo)
    except (OSError, UnicodeError):
        pytest.skip("the disk has no such names")
    searched = engine(tmp_path)
    assert counts(searched) == (1, 1, 0, 0) and counts(searched) == (1, 0, 0, 0)
    assert [one.path for one in searched.find(QUERY)] == [str(photo)]


def test_picture_that_is_asked_through_a_link_is_not_found(tmp_path: Path) -> None:
    photos = [draw(tmp_path / "photos" / f"{k}.png", k) for k in range(3)]
    link = tmp_path / "photos" / "link.png"
    link.symlink_to(photos[0])
    searched = engine(tmp_path)
    searched.update()
    assert {one.path for one in searched.find([Term(1.0, path=link)])} == set(map(str, photos[1:]))
    assert {one.path for one in searched.find([Term(1.0, path=photos[0])])} == {*map(str, photos[1:]), str(link)}


def test_vectors_are_stored_as_they_are(tmp_path: Path) -> None:
    photos = [draw(tmp_path / "photos" / f"{k}.png", k) for k in range(4)]
    searched = engine(tmp_path)
    searched.update()
    found = searched._index.pictures(os.fsencode(tmp_path / "photos"))
    for path, row in zip(found.paths, found.rows):
        assert np.array_equal(found.vectors[row], picture_vector(Path(os.fsdecode(path))))
    assert len(found.paths) == len(photos)


@pytest.mark.fault(
    "A search index contains a damaged vector, or a vector of another model",
    "An error names the file, and the search returns no results",
)
@pytest.mark.parametrize("value", [b"", b"123", np.ones(DIM + 1, "<f4").tobytes(), "a text", 7.5])
def test_vector_of_another_kind_names_the_index(tmp_path: Path, value: object) -> None:
    photos = [draw(tmp_path / "photos" / f"{k}.png", k) for k in range(3)]
    searched = engine(tmp_path)
    searched.update()
    searched.find(QUERY)
    told = r"sqlite3 holds a vector of another length or type: remove it, and the index is rebuilt"
    for table in ("contents", "texts"):
        (file,) = (tmp_path / "cache" / "search").glob("*.sqlite3")
        with sqlite3.connect(file) as connection:
            before = connection.execute(f"SELECT max(rowid), vector FROM {table}").fetchone()
            connection.execute(f"UPDATE {table} SET vector = ? WHERE rowid = ?", (value, before[0]))
        with pytest.raises(ValueError, match=told):
            engine(tmp_path).find(QUERY)
        with sqlite3.connect(file) as connection:
            connection.execute(f"UPDATE {table} SET vector = ? WHERE rowid = ?", before[::-1])
    check(engine(tmp_path), photos)


def test_vector_that_is_not_finite_names_the_index(tmp_path: Path) -> None:
    draw(tmp_path / "photos" / "a.png", 1), draw(tmp_path / "photos" / "b.png", 2)
    engine(tmp_path).update()
    (file,) = (tmp_path / "cache" / "search").glob("*.sqlite3")
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE contents SET vector = ? WHERE id = 2", (np.full(DIM, np.nan, "<f4").tobytes(),))
    with pytest.raises(
        ValueError, match=r"sqlite3 holds a vector that is not finite: remove it, and the index is rebuilt"
    ):
        engine(tmp_path).find(QUERY, 1)


def test_file_of_another_program_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "cache" / "search" / "colours.sqlite3"
    file.parent.mkdir(parents=True)
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE history (name TEXT)")
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"colours\.sqlite3 is not a search index: remove it to build one"):
        engine(tmp_path)
    assert file.read_bytes() == before


def test_index_that_may_be_read_only_is_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    photo = draw(tmp_path / "photos" / "a.png", 1)
    engine(tmp_path).update()

    def refused(*_: object) -> None:
        raise OSError("attempt to write a readonly database")

    monkeypatch.setattr(Index, "keep_text", refused)
    check(engine(tmp_path), [photo])
    assert "the vector of the text is not stored: attempt to write a readonly" in caplog.text
