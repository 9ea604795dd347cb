"""The command line of `fastclip search`, and the names that it prints."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import needs

needs("train")
from PIL import Image

from fastclip.cli import main
from fastclip.data.picture import is_drawn
from fastclip.search import contact_sheet as sheets
from support.colours import draw
from support.faulty import large_png

NAMES = ("a b.png", "犬 ü.png", "it's.png", "\x1b[31mred\n.png", os.fsdecode(b"caf\xe9.png"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos").resolve()
    for k, name in enumerate(NAMES):
        draw(folder / f"{k}.png", k).rename(folder / name)
    return folder


class Terminal(io.TextIOWrapper):
    """A stand-in for stdout that collects what is written, as a terminal or as a pipe to another program."""

    def __init__(self, encoding: str, *, terminal: bool) -> None:
        super().__init__(io.BytesIO(), encoding)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def written(self) -> bytes:
        self.flush()
        return self.buffer.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def search(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Function that runs the command and returns its exit status and the bytes on stdout."""
    level = logging.getLogger("fastclip").level

    def run(*words: object, encoding: str = "utf-8", terminal: bool = False) -> tuple[int, bytes]:
        stdout = Terminal(encoding, terminal=terminal)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            status = main(["search", "--checkpoint", str(checkpoint), "--device", "cpu", *map(str, words)])
        return status, stdout.written()

    yield run
    logging.getLogger("fastclip").setLevel(level)


@pytest.mark.parametrize(
    "words",
    [
        ("dog", "FOLDER", "-t", "2", "-f"),
        ("dog", "-t", "2", "FOLDER", "-f"),
        ("-ft2", "dog", "--workers", "1", "FOLDER"),
        ("--top=2", "-f", "--", "dog", "FOLDER"),
        ("dog", "--work", "1", "FOLDER", "--to", "2", "--filepath-only"),
    ],
)
def test_folder_may_follow_options(search: Any, photos: Path, words: tuple[str, ...]) -> None:
    expected = search("dog", photos, "-f", "-t", 2)
    assert expected[1].count(b"\n") >= 2
    assert search(*(photos if word == "FOLDER" else word for word in words)) == expected


def test_word_that_begins_with_a_hyphen_is_a_query(
    search: Any, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("-t", 3, "--json")
    for query in ("-night", "-horse", "-tiger", "-night sky", "--no such text"):
        status, data = search(query, photos, *common)
        assert status == 0 and len(json.loads(data)) == 3
        assert search(*common, "--", query, photos) == (status, data)
    assert search("dog", "--subtract", "-night", photos, *common) == search("dog", "--subtract=-night", photos, *common)
    with pytest.raises(SystemExit):
        search("dog", "--no-such-option", photos)
    assert "unrecognized arguments: --no-such-option" in capsys.readouterr().err


def test_names_are_given_to_programs_as_they_are(search: Any, photos: Path) -> None:
    inside = {os.fsencode(photos / name) for name in NAMES}
    for encoding in ("utf-8", "latin-1", "ascii"):
        status, data = search("dog", photos, "--print0", encoding=encoding)
        assert status == 0 and {*data.split(b"\0")} == {*inside, b""}
        status, data = search("dog", photos, encoding=encoding)
        assert status == 0 and all(b"\t" + name + b"\n" in data for name in inside)
    rows = json.loads(search("dog", photos, "--json", encoding="ascii")[1])
    assert {os.fsencode(row["path"]) for row in rows} == inside


def test_names_are_quoted_on_a_terminal(search: Any, photos: Path) -> None:
    status, data = search("dog", photos, "-f", terminal=True)
    shown = {line.removeprefix(f"{photos}/") for line in data.decode().splitlines()}
    quoted = {f"$'{photos}/\\E[31mred\\n.png'", f"$'{photos}/caf\\351.png'"}
    assert status == 0 and shown == {"a b.png", "犬 ü.png", "it's.png", *quoted}
    status, data = search("dog", photos, "-f", terminal=True, encoding="latin-1")
    assert status == 0 and len(data.splitlines()) == 5 and b"/? \xfc.png\n" in data
    assert search("dog", photos, "--print0", terminal=True)[1].count(b"\0") == 5


def test_large_pictures_are_read_where_that_is_asked(
    search: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # the option changes it
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "large.png").write_bytes(large_png(10_000))
    status, data = search("dog", tmp_path / "photos")
    assert (status, data) == (0, b"") and "raise --max-pixels to read it" in caplog.text
    status, data = search("dog", tmp_path / "photos", "--max-pixels", "1e8")
    assert status == 0 and data.endswith(b"large.png\n")


def test_sheet_shows_any_name(search: Any, photos: Path, tmp_path: Path) -> None:
    for name in ("s.png", "s.JPG", "s.webp"):
        assert search("dog", photos, "--sheet", tmp_path / name)[0] == 0
        with Image.open(tmp_path / name) as sheet:
            assert sheet.size == (5 * 240, 272) and sheet.format in ("PNG", "JPEG", "WEBP")
        assert is_drawn(tmp_path / name) and search("dog", photos, "--sheet", tmp_path / name)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.JPG", "s.png", "s.webp"]


def test_sheet_that_is_too_long_for_its_format_shows_the_first(
    search: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sheets, "_LONGEST", {".jpg": 2 * 272 + 271})
    monkeypatch.setattr(sheets, "_COLUMNS", 2)
    every = search("dog", photos)
    for name, rows, told in (("s.jpg", 2, "s.jpg shows the first 4 of 5 images"), ("s.png", 3, "")):
        assert search("dog", photos, "--sheet", tmp_path / name) == every
        with Image.open(tmp_path / name) as written:
            assert written.size == (480, 272 * rows)
        err = capsys.readouterr().err
        assert told in err and ("shows the first" in err) == bool(told)


def test_folder_without_other_pictures_than_the_querys_is_told(
    search: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path.resolve() / "photos"
    picture = draw(folder / "a.png", 1)
    assert search(picture, folder) == (0, b"")
    assert f"fastclip search: no images of {folder} except those of the query are indexed" in capsys.readouterr().err
    picture.unlink()
    assert search("dog", folder) == (0, b"")
    assert f"fastclip search: no images of {folder} are indexed: check the folder" in capsys.readouterr().err
