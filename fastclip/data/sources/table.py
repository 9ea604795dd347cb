"""Read images and captions that are listed in a table, in open_clip's layout."""

from __future__ import annotations

import csv
import filecmp
import io
import logging
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TextIO
from urllib.parse import urlsplit

from fastclip.data.faults import BadSample, Fault, Tally, shown
from fastclip.data.files import compression, existing, open_file
from fastclip.data.source import PictureFiles, Strings
from fastclip.data.sources.captions import given_captions
from fastclip.data.sources.columns import CAPTION_COLUMNS, IMAGE_COLUMNS, UNNAMED, Named, choose
from fastclip.data.sources.folder import is_picture

__all__ = ["Table"]

logger = logging.getLogger(__name__)
_SEPARATORS = ",\t;|"
_LOOKED_FOR = 100  # rows whose image files are looked for when the table is opened
_HEADER = 20  # the most lines of a header
_LINE_END = re.compile(r"\r\n?|\n")
_QUOTES = "close the quote; if it belongs to a caption, double it and put the whole caption in quotes"


class Table(PictureFiles):
    """The rows of a .csv or .tsv file in UTF-8 with a header, one sample per row.

    Paths of images are in the column `filepath`, `image`, `path` or `file_name`, captions in `title`, `caption` or
    `text`, in upper or lower case. ``TABLE#image=NAME,caption=NAME`` names other columns. The separator is detected in
    the header: comma, tab, semicolon or vertical bar (|). A line ``sep=;``, as Excel writes it, may precede the header.
    Fields are quoted as in Python's `csv`.

    A relative path is looked for in the table's folder and in the working directory. If both have the file and the
    files differ, the sample cannot be used. Images are opened only when they are read. A damaged row is an unusable
    sample.

    A quoted field may contain line ends. A quote that was never closed is an error, because it would swallow the rows
    after it. Such a quote is assumed in two cases. First, the row cannot be parsed and extends over several lines.
    Second, most lines of a field look like rows of the table: they have as many columns as the header, and the column
    of images contains a name with the suffix of an image, or with the same suffix or folder as the row's image.

    Args:
        columns: the columns that the user has named.

    Raises:
        OSError: the table cannot be read.
        ValueError: a column is missing, no row can be used, a quote is not closed, or the file is not a table in UTF-8.
            The message names the file and the line.
    """

    def __init__(self, spec: str, path: str | None = None, *, columns: Named = UNNAMED) -> None:
        super().__init__(spec, Path(path or spec).parent.absolute())
        self._here, self._captions = Path.cwd(), Strings()
        self._faults: dict[int, Fault] = {}
        for row in _rows(path or spec, spec, columns):
            if row.fault is not None:
                self._faults[len(self._names)] = row.fault
            self._names.append(row.file)
            self._captions.append(row.caption)
        if not len(self):
            raise ValueError(f"{spec}: the table has a header and no rows")
        if len(self._faults) == len(self):
            first = self._faults[0]
            raise ValueError(f"{spec}: none of {len(self)} rows can be used; the first is {first.key}: {first.reason}")
        if not any(self._captions[index] for index in range(len(self))):
            raise ValueError(f"{spec}: all {len(self)} captions are empty")
        if self._faults:
            causes = Tally(self._faults.values())
            logger.warning("%s: %d of %d rows cannot be used: %s", spec, len(self._faults), len(self), causes)
        self._say_where()

    def captions(self, index: int) -> tuple[str, ...]:
        if (fault := self._faults.get(index)) is not None:
            raise BadSample(*fault)
        return given_captions(self._captions[index], self.key(index))

    def key(self, index: int) -> str:
        fault = self._faults.get(index)
        return self._names[index] if fault is None else fault.key

    def picture_place(self, index: int) -> tuple[str, str]:
        """Return the path of the image's file and ""; see `fastclip.data.source.picture_place`."""
        if not self._names[index]:  # a damaged row
            return "", self.key(index).removeprefix(f"{self.spec}, ")
        return super().picture_place(index)

    def _file(self, index: int) -> Path:
        """Return the path of the image.

        Raises BadSample if there is no such file, or if the table's folder and the working directory have different
        files.
        """
        name = self._names[index]
        beside = existing(self._folder, name)
        here = beside if self._here == self._folder else existing(self._here, name)
        if beside is None and here is None:
            where = f"no such file in the folder of {self.spec} or in the working directory"
            if urlsplit(name).scheme in ("http", "https"):
                where = "URLs in a table are not fetched: download the images with img2dataset, which writes shards"
            raise BadSample("missing file", self.key(index), where)
        if beside is not None and here is not None and not _same(beside, here):
            what = (
                f"two different images, {beside} and {here}: write an absolute path, or run the command in the table's "
                "folder"
            )
            raise BadSample("ambiguous file", self.key(index), what)
        path = beside or here
        assert path is not None
        return path

    def _say_where(self) -> None:
        names = (self._names[k] for k in range(min(len(self), _LOOKED_FOR)) if k not in self._faults)
        first = next((name for name in names if not existing(self._folder, name) and existing(self._here, name)), "")
        if first:
            message = "%s: images such as %s are not in the table's folder and are read from the working directory, %s"
            logger.warning(message, self.spec, first, self._here)


def _same(one: Path, other: Path) -> bool:
    try:
        return one == other or os.path.samefile(one, other) or filecmp.cmp(one, other, shallow=False)
    except OSError:
        return False


class _Row(NamedTuple):
    file: str = ""
    caption: str = ""
    fault: Fault | None = None


def _rows(path: str, spec: str, columns: Named) -> Iterator[_Row]:
    with open_file(path) as opened:
        head = opened.read(4096)
        if how := compression(head):
            raise ValueError(f"{spec}: the table is compressed by {how}: unpack it first")
        if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head:
            raise ValueError(f"{spec}: the table is not UTF-8, but UTF-16 or binary: save it as UTF-8")
        opened.seek(0)
        # Bytes that are not UTF-8 are valid in a path. In a caption they are a fault of its row.
        yield from _parsed(io.TextIOWrapper(opened, "utf-8-sig", "surrogateescape", newline=""), spec, columns)


def _parsed(file: TextIO, spec: str, columns: Named) -> Iterator[_Row]:
    above, separators, first = 0, _SEPARATORS, file.readline()
    while first and (not first.strip() or first.lower().startswith("sep=")):
        above += 1
        separators = first.strip("\r\n")[4:] or separators
        first = file.readline()
    header = [first, *islice(iter(file.readline, ""), _HEADER - 1)]  # a quoted name may contain line ends
    separator, image, caption = _columns(header, separators, spec, columns)
    file.seek(0)
    for _ in range(above):
        file.readline()
    rows = csv.reader(file, delimiter=separator, strict=True)  # strict: an open quote is an error at the file's end
    width = 0  # columns of the header, which is the first row
    while True:
        line = above + rows.line_num + 1  # the first line of the row
        where = f"{spec}, line {line}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            end = above + rows.line_num
            if end > line:
                raise ValueError(
                    f"{where}: {error}; a quote opens a field there that extends to line {end}: {_QUOTES}"
                ) from error
            if not width or "expected after" not in str(error):  # after other errors the next row cannot be located
                raise ValueError(f"{where}: {error}") from error
            yield _Row(fault=Fault("damaged row", where, str(error)))
            continue
        if row is None:
            return
        if not width:
            width = len(row)
        elif row:  # not a blank line
            if (end := above + rows.line_num) > line and _swallowed(row, width, image, separator):
                what = f"a quote opens a field that extends to line {end}, and its lines look like rows of the table"
                raise ValueError(f"{where}: {what}: {_QUOTES}")
            yield _checked(row, width, image, caption, where)


def _swallowed(row: list[str], width: int, image: int, separator: str) -> bool:
    """Return True if most lines of a field look like rows of the table that an open quote has swallowed."""
    picture = row[image].strip() if image < len(row) else ""
    for place, field in enumerate(row):
        lines = _LINE_END.split(field)
        judged = alike = beside = 0
        for number, line in enumerate(lines if len(lines) > 1 else ()):
            cells = line.split(separator)
            column, whole = image, width
            if number == 0:  # the first line of the field lacks the columns before the quote
                column, whole = image - place, width - place
            elif number == len(lines) - 1:  # the last line lacks the columns after the quote
                whole = width - (len(row) - place - 1)
            if line.strip() and 0 <= column < whole:  # otherwise the image's column is outside of the field
                judged += 1
                plain = len(cells) == whole and all(cell == cell.strip() for cell in cells)  # prose has blanks
                if plain and _like(cells[column], picture):
                    alike += 1
                    beside += 1 if os.path.dirname(cells[column]) == os.path.dirname(picture) else 0
        if alike > judged / 2 and (judged > 1 or beside):  # a single line may be prose that looks like a row by chance
            return True
    return False


def _like(name: str, picture: str) -> bool:
    """Return True if `name` has the suffix of an image, or the suffix or the folder of the path `picture`."""
    folder, base = os.path.split(name)
    if is_picture(name) or (folder and base and folder == os.path.dirname(picture)):
        return True
    suffix = os.path.splitext(picture)[1].lower()
    return bool(suffix) and suffix == os.path.splitext(name)[1].lower()


def _checked(row: list[str], width: int, image: int, caption: int, where: str) -> _Row:
    if len(row) != width:
        return _Row(fault=Fault("damaged row", where, f"{len(row)} fields, but the header has {width}"))
    path, text = row[image].strip(), row[caption].strip()
    if not path:
        return _Row(fault=Fault("damaged row", where, "the path is empty"))
    try:
        text.encode()
    except UnicodeEncodeError:
        return _Row(path, text, Fault("damaged caption", where, "its caption is not UTF-8"))
    return _Row(path, text)


def _columns(header: list[str], separators: str, spec: str, columns: Named) -> tuple[str, int, int]:
    """Return the separator, and the indices of the columns of images and captions."""
    widest: list[str] = []
    for separator in separators:
        names = _names(header, separator, spec)
        widest = max(widest, names, key=len)
    for separator in separators:
        names = _names(header, separator, spec)
        if columns != UNNAMED and len(names) < len(widest):
            continue
        image = choose(names, "image", IMAGE_COLUMNS, columns.image, spec)
        caption = choose(names, "caption", CAPTION_COLUMNS, columns.caption, spec) if image is not None else None
        if image is not None and caption is not None:
            rest = [shown(name) for place, name in enumerate(names) if place not in (image, caption)]
            taken = f"{names[image]} and {names[caption]}"
            logger.info("%s: the columns %s are read; ignored columns: %s", spec, taken, ", ".join(rest) or "none")
            return separator, image, caption
    columns_there = [shown(name[:80]) for name in widest]  # cut: a name with an open quote may contain whole rows
    raise ValueError(
        f"{spec}: the table needs a column of images ({', '.join(IMAGE_COLUMNS)}) and a column of captions "
        f"({', '.join(CAPTION_COLUMNS)}), but its columns are {', '.join(columns_there) or 'none'}. To use other "
        f"columns, write {spec}#image=NAME,caption=NAME. Columns are separated by comma, tab, semicolon or vertical bar"
    )


def _names(header: list[str], separator: str, spec: str) -> list[str]:
    """Return the names of the columns, which are the first row of these lines."""
    try:
        return [name.strip() for name in next(csv.reader(header, delimiter=separator), [])]
    except csv.Error as error:
        raise ValueError(f"{spec}: the header of the table cannot be read: {error}") from error
