"""Folders of images: which files are visited, which caption file belongs to an image, and reports on all others."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path

import pytest

from support import needs
from support.faulty import picture

needs("train")

from fastclip.data import BadSample, Fault, open_source
from fastclip.data.faults import Tally
from fastclip.data.files import read_file, walk


def put(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"a caption" if name.lower().endswith(".txt") else picture(len(name)))


def told(folder: Path) -> dict[str, tuple[str, ...] | str]:
    """Map each image to its captions, or to the cause of its fault."""
    source, found = open_source(str(folder)), {}
    for k in range(len(source)):
        try:
            found[os.path.relpath(source.key(k), folder)] = source[k].captions
        except BadSample as bad:
            found[os.path.relpath(source.key(k), folder)] = bad.fault.cause
    return found


def test_walk_leaves_out_what_is_hidden_and_names_links(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "b/1.png", "a/2.png", "a/._2.png", ".git/3.png", "a/.c/4.png", "skip/5.png", "0.png", "a/d/6.png")
    (tmp_path / "b" / "round").symlink_to(tmp_path)
    (tmp_path / "b" / "itself.png").symlink_to("itself.png")
    expected = ["0.png", "a/2.png", "a/d/6.png", "b/1.png", "b/itself.png"]
    found = [entry.path for _, entries in walk(str(tmp_path), ["skip"]) for entry in entries]
    assert [os.path.relpath(path, tmp_path) for path in found] == expected
    assert [entry.path for _, entries in walk(os.fsencode(tmp_path), ["skip"]) for entry in entries] == [
        os.fsencode(path) for path in found
    ]
    assert caplog.messages == [f"{tmp_path}: 1 links to folders are not followed; the first is {tmp_path}/b/round"] * 2
    with pytest.raises(FileNotFoundError):
        list(walk(str(tmp_path / "none")))


@pytest.mark.fault("A folder cannot be listed", "The log names it, and the other folders are read")
def test_walk_names_folders_that_cannot_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "a/1.png", "a/1.txt", "b/2.png", "b/2.txt")
    listed = os.scandir

    def denied(path: str) -> object:  # root may list everything
        if path == str(tmp_path / "a"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert told(tmp_path) == {"b/2.png": ("a caption",)}
    assert caplog.messages == [f"skipped: {tmp_path}/a: Permission denied"]


@pytest.mark.fault(
    "A pipe or a device in place of an image or a caption file", "It is counted by cause, and nothing waits for it"
)
def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "0.png", "0.txt", "1.txt", "2.png", "3.txt")
    os.mkfifo(tmp_path / "1.png")
    os.mkfifo(tmp_path / "2.txt")
    (tmp_path / "3.png").symlink_to("/dev/zero")
    unread = "unreadable file"
    assert told(tmp_path) == {"0.png": ("a caption",), "1.png": unread, "2.png": unread, "3.png": unread}
    with pytest.raises(OSError, match=r"1\.png is a pipe or a device"):
        read_file(tmp_path / "1.png")


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (unicodedata.normalize("NFD", "é.png"), unicodedata.normalize("NFC", "é.txt")),
        (unicodedata.normalize("NFC", "ÅÉ ö.JPG"), unicodedata.normalize("NFD", "ÅÉ ö.txt")),
        ("a.PNG", "a.TXT"),
        ("a.v2.jfif", "a.v2.txt"),
        ("a\nb.JPE", "a\nb.txt"),
        ("a\udcff.png", "a\udcff.txt"),
    ],
)
def test_caption_file_is_found_by_its_name(
    tmp_path: Path, image: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, f"a/{image}", f"a/{text}")
    assert told(tmp_path) == {f"a/{image}": ("a caption",)} and not caplog.messages
    assert open_source(str(tmp_path)).key(0) == f"{tmp_path}/a/{image}"


def test_caption_file_of_the_very_name_goes_first(tmp_path: Path) -> None:
    composed, split = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    put(tmp_path, f"{composed}.png", f"{split}.png", f"{composed}.txt", f"{split}.txt")
    (tmp_path / f"{split}.txt").write_text("another")
    assert told(tmp_path) == {f"{composed}.png": ("a caption",), f"{split}.png": ("another",)}


def test_json_makes_up_for_an_empty_text(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png", "c.png")
    for name, text in (("a.txt", "\n"), ("a.json", '{"caption": "a cat"}'), ("b.txt", " "), ("b.json", '{"url": ""}')):
        (tmp_path / name).write_text(text)
    (tmp_path / "c.txt").write_bytes(b"\xff")
    (tmp_path / "c.json").write_text('{"caption": "x"}')
    assert told(tmp_path) == {"a.png": ("a cat",), "b.png": "empty caption", "c.png": "damaged caption"}


@pytest.mark.fault(
    "A folder of images contains files that are neither images nor captions", "The log counts them by kind"
)
def test_folder_says_what_it_passes_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "0.png", "0.txt", "a/9.txt", "a/b.svg", "c.svg", "README")
    assert told(tmp_path) == {"0.png": ("a caption",)}
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path}: ignored files: 2 .svg (c.svg, a/b.svg), ")
    assert "1 .txt without a picture (a/9.txt)" in line and "1 without a suffix (README)" in line
    for name in ("0.png", "0.txt"):
        (tmp_path / name).unlink()
    with pytest.raises(
        ValueError, match=rf"{re.escape(str(tmp_path))}: the folder holds no images .* it holds 2 \.svg"
    ):
        open_source(str(tmp_path))


def test_heif_without_its_library_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "0.png", "0.txt", "1.txt")
    (tmp_path / "1.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    monkeypatch.setattr("fastclip.data.picture._HEIF", False)
    source = open_source(str(tmp_path))
    with pytest.raises(BadSample, match=r"1\.HEIC: not a readable image: HEIF needs pillow-heif"):
        source[1]


def test_names_that_no_terminal_prints_are_quoted() -> None:
    keys = ["a b.jpg", "\x1b[31m.jpg", "a\nb.jpg", "\udcff.jpg", "\ud800.jpg"]
    expected = ["a b.jpg", r"$'\E[31m.jpg'", r"$'a\nb.jpg'", r"$'\377.jpg'", r"$'\355\240\200.jpg'"]
    for key, text in zip(keys, expected, strict=True):
        assert str(BadSample("x", key, "no")) == f"{text}: no"
        assert str(Tally([Fault("x", key, "no")])) == f"1 x ({text})"
