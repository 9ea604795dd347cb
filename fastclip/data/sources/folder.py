"""Images in a folder, each with a file of its captions in the same folder."""

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
    """An image file, and the files of its captions in the same folder."""

    name: str  # relative to the folder that is walked
    text: str  # name of its .txt without folders; "" if there is none
    json: str  # name of its .json without folders; "" if there is none

    @property
    def captioned(self) -> bool:
        return bool(self.text or self.json)


def is_picture(name: str) -> bool:
    """Return True if the name has the suffix of an image file, in upper or lower case."""
    return os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES


def pictures(folder: Path, passed: Tally | None = None, links: list[str] | None = None) -> Iterator[PictureFile]:
    """Yield every image under `folder` that is not hidden, in the order of `fastclip.data.files.walk`.

    A caption file has the name of its image except for the suffix. Suffixes may be in upper case, and names may differ
    in their Unicode normal form: macOS stores an accented letter as two characters.

    Args:
        passed: a tally that counts the other files by suffix.
        links: a list that receives the links to folders, as in `walk`.
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
    """Raised for a folder in which no image has a caption. The folder may hold one folder per class instead.

    `outside` is True if images are in the folder itself and thus belong to no class. `links` are the links to folders.
    """

    def __init__(self, message: str, outside: bool, links: list[str]) -> None:
        super().__init__(message)
        self.outside, self.links = outside, links


class Uncaptioned(PictureFiles):
    """Images of a folder in which no image has a caption. They can be embedded, but not used as pairs."""


class Folder(PictureFiles):
    """All images under a folder, such as ``a/1.jpg`` with captions in ``a/1.txt`` or ``a/1.json``.

    A .txt holds one caption per line. A .json, as img2dataset writes it, holds captions in "caption". The .txt takes
    precedence unless it is empty. If `caption` names a field of the .json files, only the .json files are read. Caption
    files are read together with their sample. The log counts all other files.

    Raises:
        NoCaptions: there are no images, or none has captions. The message has the number of images and names the first.
            In this case the constructor does not log the links to folders: the caller does (`log_links`).
    """

    def __init__(self, spec: str, folder: str | None = None, *, caption: str = "") -> None:
        super().__init__(spec, Path(folder or spec))
        self._field = caption
        self.passed = passed = Tally()
        captioned, outside, links = False, False, list[str]()
        self._beside: dict[int, PictureFile] = {}  # images whose caption files are not simply STEM.txt and STEM.json
        for picture in pictures(self._folder, passed, links):
            stem = os.path.splitext(os.path.basename(picture.name))[0]
            if (picture.text or f"{stem}.txt", picture.json or f"{stem}.json") != (f"{stem}.txt", f"{stem}.json"):
                self._beside[len(self._names)] = picture
            self._names.append(picture.name)
            captioned = captioned or picture.captioned
            outside = outside or not os.path.dirname(picture.name)
        if not len(self):
            kinds = ", ".join(sorted(PICTURE_SUFFIXES))
            raise NoCaptions(f"{spec}: the folder holds no images ({kinds}){passed.also_holds()}", outside, links)
        if not captioned:
            first = self._file(0)
            message = f"none of {len(self)} images has a caption; the first is {first}: {_wanted(first)}"
            raise NoCaptions(f"{spec}: {message}{passed.also_holds()}", outside, links)
        log_links(str(self._folder), links)
        if passed.total:
            logger.warning("%s: ignored files: %s", spec, passed)

    def captions(self, index: int) -> tuple[str, ...]:
        path, (text, about) = self._file(index), self._caption_files(index)
        key = str(path)
        try:
            files = [file for file in ((about,) if self._field else (text, about)) if file.exists()]
            if not files:
                wanted = f"{about.name} must be in the same folder" if self._field else _wanted(path)
                raise BadSample("no caption", key, f"it has no caption: {wanted}")
            field = self._field or "caption"
            return first_captions([partial(_read, file, key, field, lines=file is text) for file in files])
        except OSError as error:
            raise BadSample(
                "unreadable file", key, f"its caption file cannot be read: {error.strerror or error}"
            ) from error

    def fields(self, index: int) -> dict[str, Any]:
        """Return the fields of the image's .json; see `fastclip.data.source.sample_fields`."""
        try:
            return json_fields(read_file(self._caption_files(index)[1]))
        except OSError:
            return {}

    def _caption_files(self, index: int) -> tuple[Path, Path]:
        """Return the paths of an image's .txt and .json, whether they exist or not."""
        path, picture = self._file(index), self._beside.get(index)
        text, about = path.with_suffix(".txt"), path.with_suffix(".json")
        if picture is None:
            return text, about
        return path.with_name(picture.text or text.name), path.with_name(picture.json or about.name)


def _read(file: Path, key: str, field: str, *, lines: bool) -> tuple[str, ...]:
    data = read_file(file)
    return text_captions(data, key, lines=True) if lines else json_captions(data, key, field)


def _wanted(path: Path) -> str:
    return f"{path.with_suffix('.txt').name} or {path.with_suffix('.json').name} must be in the same folder"
