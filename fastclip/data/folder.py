"""Pictures in a folder, each with a file of its captions beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastclip.data.faults import BadSample
from fastclip.data.picture import PICTURE_SUFFIXES, json_captions, json_fields, read_picture, text_captions
from fastclip.data.source import Record
from fastclip.data.strings import Strings

__all__ = ["Folder", "pictures"]


def pictures(folder: Path) -> Iterator[tuple[str, bool]]:
    """Relative path of every picture under `folder`, sorted in each folder, and whether captions lie beside it.

    What is hidden, and links to folders, are left out.
    """
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        beside = set(files)
        for name in sorted(files):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in PICTURE_SUFFIXES and not name.startswith("."):
                told = not beside.isdisjoint((f"{stem}.txt", f"{stem}.json"))
                yield os.path.relpath(os.path.join(path, name), folder), told


class Folder:
    """Every picture under a folder: ``a/1.jpg`` with ``a/1.txt``, one caption a line, or ``a/1.json`` with "caption".

    A .txt goes before a .json; that is what img2dataset writes as files. Both are read when the sample is.

    Raises:
        ValueError: there is no picture, or none with captions; the message counts them and names the first.
    """

    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self._folder = Path(spec)
        found = list(pictures(self._folder))
        if not found:
            raise ValueError(f"{spec}: the folder holds no pictures ({', '.join(sorted(PICTURE_SUFFIXES))})")
        if not any(told for _, told in found):
            first = self._folder / found[0][0]
            raise ValueError(f"{spec}: none of {len(found)} pictures has a caption, first {first}: {_wanted(first)}")
        self._names = Strings(name for name, _ in found)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Record:
        return self.read(index)

    def read(self, index: int, *, min_side: int | None = None) -> Record:
        """As `fastclip.data.source.read_sample`."""
        captions, path = self.captions(index), self._file(index)
        return Record(read_picture(path, str(path), min_side=min_side), captions, str(path))

    def captions(self, index: int) -> tuple[str, ...]:
        path = self._file(index)
        text = path.with_suffix(".txt")
        try:
            if text.exists():
                return text_captions(text.read_bytes(), str(path), lines=True)
            return json_captions(path.with_suffix(".json").read_bytes(), str(path))
        except FileNotFoundError as error:
            raise BadSample("no caption", str(path), f"it has no caption: {_wanted(path)}") from error
        except OSError as error:
            raise BadSample("unreadable file", str(path), f"its caption file: {error.strerror}") from error

    def key(self, index: int) -> str:
        return str(self._file(index))

    def picture_bytes(self, index: int) -> bytes:
        """As `fastclip.data.source.picture_bytes`."""
        return self._file(index).read_bytes()

    def fields(self, index: int) -> dict[str, Any]:
        """As `fastclip.data.source.sample_fields`."""
        try:
            return json_fields(self._file(index).with_suffix(".json").read_bytes())
        except OSError:
            return {}

    def _file(self, index: int) -> Path:
        """The picture's."""
        return self._folder / self._names[index]


def _wanted(path: Path) -> str:
    return f"{path.with_suffix('.txt').name} or {path.with_suffix('.json').name} must lie beside it"
