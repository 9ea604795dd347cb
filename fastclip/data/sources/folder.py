"""Pictures in a folder, each with a file of its captions beside it."""

from __future__ import annotations

import logging
import os
import unicodedata
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from fastclip.data.faults import BadSample, Tally
from fastclip.data.files import log_links, read_file, walk
from fastclip.data.picture import PICTURE_SUFFIXES
from fastclip.data.source import PictureFiles
from fastclip.data.sources.captions import first_captions, json_captions, json_fields, text_captions

__all__ = ["Folder", "NoCaptions", "PictureFile", "Uncaptioned", "is_picture", "pictures"]

logger = logging.getLogger(__name__)
_CAPTIONS = (".txt", ".json")


class PictureFile(NamedTuple):
    """A picture, and the files of its captions, which lie in the same folder."""

    name: str  # relative to the folder that was asked for
    text: str  # the name of its .txt, without folders; "" where there is none
    json: str

    @property
    def captioned(self) -> bool:
        return bool(self.text or self.json)


def is_picture(name: str) -> bool:
    """Return True if the file's name ends as a picture's does, in any case."""
    return os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES


def pictures(folder: Path, passed: Tally | None = None, links: list[str] | None = None) -> Iterator[PictureFile]:
    """Every picture under `folder` that is not hidden, sorted in each folder; as `fastclip.data.files.walk` goes.

    A caption file has the picture's name but for the suffix. Names that differ in Unicode's normal form only (an e with
    an accent as one character or two, as macOS has it), and suffixes in capitals, are the same.

    Args:
        passed: counts the other files by their suffixes.
        links: as `walk`'s.
    """
    start = len(os.path.join(folder, ""))
    for _, entries in walk(str(folder), links=links):
        names = {entry.name for entry in entries}
        beside = {_plain(name): name for name in names if os.path.splitext(name)[1].lower() in _CAPTIONS}
        used = set()
        for entry in entries:
            if is_picture(entry.name):
                stem = os.path.splitext(entry.name)[0]
                files = [stem + end if stem + end in names else beside.get(_plain(stem + end), "") for end in _CAPTIONS]
                used |= {entry.name, *files}
                yield PictureFile(entry.path[start:], *files)
        if passed is not None:
            for entry in entries:
                if entry.name not in used:
                    passed.count(_kind(entry.name), entry.path[start:])


def _plain(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    return (stem if stem.isascii() else unicodedata.normalize("NFC", stem)) + suffix.lower()


def _kind(name: str) -> str:
    suffix = os.path.splitext(name)[1].lower()
    return f"{suffix} without a picture" if suffix in _CAPTIONS else suffix or "without a suffix"


class NoCaptions(ValueError):
    """Raised for a folder without pictures that have captions: a folder of classes, perhaps.

    `outside` says whether pictures lie in the folder itself, and so outside of any class.
    """

    def __init__(self, message: str, outside: bool, links: list[str]) -> None:
        super().__init__(message)
        self.outside, self.links = outside, links


class Uncaptioned(PictureFiles):
    """Pictures of a folder of which none has a caption: to be embedded, and nothing else."""


class Folder(PictureFiles):
    """Every picture under a folder: ``a/1.jpg`` with ``a/1.txt``, one caption a line, or ``a/1.json`` with "caption".

    A .txt goes before a .json, unless it is empty, or `caption` names another field of the .json files; that is what
    img2dataset writes as files. Both are read when the sample is. The log counts the files that are neither.

    Raises:
        NoCaptions: there is no picture, or none with captions; the message counts them and names the first. The log
            does not count the links to folders then.
    """

    def __init__(self, spec: str, folder: str | None = None, *, caption: str = "") -> None:
        super().__init__(spec, Path(folder or spec))
        self._field = caption
        self.passed = passed = Tally()
        captioned, outside, links = False, False, list[str]()
        self._beside: dict[int, PictureFile] = {}  # of pictures whose caption files have other names than usual
        for picture in pictures(self._folder, passed, links):
            stem = os.path.splitext(os.path.basename(picture.name))[0]
            if (picture.text or f"{stem}.txt", picture.json or f"{stem}.json") != (f"{stem}.txt", f"{stem}.json"):
                self._beside[len(self._names)] = picture
            self._names.append(picture.name)
            captioned = captioned or picture.captioned
            outside = outside or not os.path.dirname(picture.name)
        if not len(self):
            kinds = ", ".join(sorted(PICTURE_SUFFIXES))
            raise NoCaptions(f"{spec}: the folder holds no pictures ({kinds}){passed.also_holds()}", outside, links)
        if not captioned:
            first = self._file(0)
            message = f"none of {len(self)} pictures has a caption, first {first}: {_wanted(first)}"
            raise NoCaptions(f"{spec}: {message}{passed.also_holds()}", outside, links)
        log_links(str(self._folder), links)
        if passed.total:
            logger.warning("%s: passed over %s", spec, passed)

    def captions(self, index: int) -> tuple[str, ...]:
        path, (text, about) = self._file(index), self._caption_files(index)
        key = str(path)
        try:
            files = [file for file in ((about,) if self._field else (text, about)) if file.exists()]
            if not files:
                wanted = f"{about.name} must lie beside it" if self._field else _wanted(path)
                raise BadSample("no caption", key, f"it has no caption: {wanted}")
            field = self._field or "caption"
            return first_captions([partial(_read, file, key, field, lines=file is text) for file in files])
        except OSError as error:
            raise BadSample("unreadable file", key, f"its caption file: {error.strerror or error}") from error

    def fields(self, index: int) -> dict[str, Any]:
        """As `fastclip.data.source.sample_fields`."""
        try:
            return json_fields(read_file(self._caption_files(index)[1]))
        except OSError:
            return {}

    def _caption_files(self, index: int) -> tuple[Path, Path]:
        """The .txt and the .json of a picture, whether they are there or not."""
        path, picture = self._file(index), self._beside.get(index)
        text, about = path.with_suffix(".txt"), path.with_suffix(".json")
        if picture is None:
            return text, about
        return path.with_name(picture.text or text.name), path.with_name(picture.json or about.name)


def _read(file: Path, key: str, field: str, *, lines: bool) -> tuple[str, ...]:
    data = read_file(file)
    return text_captions(data, key, lines=True) if lines else json_captions(data, key, field)


def _wanted(path: Path) -> str:
    return f"{path.with_suffix('.txt').name} or {path.with_suffix('.json').name} must lie beside it"
