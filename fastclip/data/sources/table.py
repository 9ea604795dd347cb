"""Pictures and captions listed in a table, in open_clip's layout."""

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
_LOOKED_FOR = 100  # rows whose pictures are looked for when the table is opened
_HEADER = 20  # lines that a header may have
_LINE_END = re.compile(r"\r\n?|\n")
_QUOTES = "close the quote; where it belongs to a caption, write it twice and put the caption in quotes"


class Table(PictureFiles):
    """One sample a row of a .csv or .tsv file in UTF-8, with a header.

    Pictures are in the column `filepath`, `image`, `path` or `file_name`, captions in `title`, `caption` or `text`, in
    any case; other columns are ignored. ``TABLE#image=NAME,caption=NAME`` names them. The header tells the separator:
    comma, tab, semicolon or bar; Excel's line ``sep=;`` may stand before it. Fields are quoted as Python's `csv` does.
    A relative path is looked for from the table's folder, then from the working directory; where both have a file, and
    the files differ, the sample cannot be used. Pictures are opened when they are read. A row that is damaged is a
    sample that cannot be used.

    A field in quotes may hold line ends. It is an error where a quote that was never closed seems to have opened it,
    so that no rows are lost: the row cannot be parsed and goes over several lines; or most lines of the field look
    like rows of the table, with as many columns as the header and, in the column of pictures, a name with a picture's
    suffix, or with the suffix or the folder of the row's own picture.

    Args:
        columns: those that the user names.

    Raises:
        OSError: the table cannot be read.
        ValueError: a column is missing, or no row can be used, or a quote is not closed, or it is another kind of
            file; the message names the file and the line.
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
            raise ValueError(f"{spec}: none of {len(self)} rows can be used, first {first.key}: {first.reason}")
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
        """As `fastclip.data.source.picture_place`."""
        if not self._names[index]:  # a damaged row
            return "", self.key(index).removeprefix(f"{self.spec}, ")
        return super().picture_place(index)

    def _file(self, index: int) -> Path:
        """The picture's; BadSample where there is none, or another one in the table's folder than here."""
        name = self._names[index]
        beside = existing(self._folder, name)
        here = beside if self._here == self._folder else existing(self._here, name)
        if beside is None and here is None:
            where = f"no such file, neither from the folder of {self.spec} nor from here"
            if urlsplit(name).scheme in ("http", "https"):
                where = "a URL, which is not fetched: img2dataset makes shards of such a table"
            raise BadSample("missing file", self.key(index), where)
        if beside is not None and here is not None and not _same(beside, here):
            what = f"two pictures, {beside} and {here}: give the path from the root, or work in the table's folder"
            raise BadSample("ambiguous file", self.key(index), what)
        path = beside or here
        assert path is not None
        return path

    def _say_where(self) -> None:
        names = (self._names[k] for k in range(min(len(self), _LOOKED_FOR)) if k not in self._faults)
        first = next((name for name in names if not existing(self._folder, name) and existing(self._here, name)), "")
        if first:
            message = "%s: pictures such as %s are not in its folder; those in the working directory, %s, are read"
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
            raise ValueError(f"{spec}: the table is not UTF-8, but UTF-16 or no text: save it as UTF-8")
        opened.seek(0)
        # bytes that are not UTF-8 may be part of a path; a caption with such is a fault of its row
        yield from _parsed(io.TextIOWrapper(opened, "utf-8-sig", "surrogateescape", newline=""), spec, columns)


def _parsed(file: TextIO, spec: str, columns: Named) -> Iterator[_Row]:
    above, separators, first = 0, _SEPARATORS, file.readline()
    while first and (not first.strip() or first.lower().startswith("sep=")):
        above += 1
        separators = first.strip("\r\n")[4:] or separators
        first = file.readline()
    header = [first, *islice(iter(file.readline, ""), _HEADER - 1)]  # a name in quotes may hold line ends
    separator, image, caption = _columns(header, separators, spec, columns)
    file.seek(0)
    for _ in range(above):
        file.readline()
    rows = csv.reader(file, delimiter=separator, strict=True)  # else an open quote swallows the rows after it
    width = 0  # of the header, which is the first row
    while True:
        line = above + rows.line_num + 1  # where the row begins
        where = f"{spec}, line {line}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            end = above + rows.line_num
            if end > line:
                raise ValueError(
                    f"{where}: {error}; a quote opens a field there that goes on to line {end}: {_QUOTES}"
                ) from error
            if not width or "expected after" not in str(error):  # where the next row begins is not known
                raise ValueError(f"{where}: {error}") from error
            yield _Row(fault=Fault("damaged row", where, str(error)))
            continue
        if row is None:
            return
        if not width:
            width = len(row)
        elif row:  # not a blank line
            if (end := above + rows.line_num) > line and _swallowed(row, width, image, separator):
                what = f"a quote opens a field that goes on to line {end}, and its lines look like rows of the table"
                raise ValueError(f"{where}: {what}: {_QUOTES}")
            yield _checked(row, width, image, caption, where)


def _swallowed(row: list[str], width: int, image: int, separator: str) -> bool:
    """Return True if most lines of a field look like rows of the table, which an open quote has swallowed."""
    picture = row[image].strip() if image < len(row) else ""
    for place, field in enumerate(row):
        lines = _LINE_END.split(field)
        judged = alike = beside = 0
        for number, line in enumerate(lines if len(lines) > 1 else ()):
            cells = line.split(separator)
            column, whole = image, width
            if number == 0:  # what stands before the quote belongs to this line
                column, whole = image - place, width - place
            elif number == len(lines) - 1:  # and what stands after it to this one
                whole = width - (len(row) - place - 1)
            if line.strip() and 0 <= column < whole:  # else its picture is not part of the field
                judged += 1
                plain = len(cells) == whole and all(cell == cell.strip() for cell in cells)  # prose has blanks
                if plain and _like(cells[column], picture):
                    alike += 1
                    beside += 1 if os.path.dirname(cells[column]) == os.path.dirname(picture) else 0
        if alike > judged / 2 and (judged > 1 or beside):  # a single line could be prose by chance
            return True
    return False


def _like(name: str, picture: str) -> bool:
    """Return True if `name` has a picture's suffix, or the suffix or the folder of `picture`."""
    folder, base = os.path.split(name)
    if is_picture(name) or (folder and base and folder == os.path.dirname(picture)):
        return True
    suffix = os.path.splitext(picture)[1].lower()
    return bool(suffix) and suffix == os.path.splitext(name)[1].lower()


def _checked(row: list[str], width: int, image: int, caption: int, where: str) -> _Row:
    if len(row) != width:
        return _Row(fault=Fault("damaged row", where, f"{len(row)} fields, the header has {width}"))
    path, text = row[image].strip(), row[caption].strip()
    if not path:
        return _Row(fault=Fault("damaged row", where, "the path is empty"))
    try:
        text.encode()
    except UnicodeEncodeError:
        return _Row(path, text, Fault("damaged caption", where, "its caption is not UTF-8"))
    return _Row(path, text)


def _columns(header: list[str], separators: str, spec: str, columns: Named) -> tuple[str, int, int]:
    """The separator, and the places of the pictures' and the captions' columns."""
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
            logger.info("%s: columns %s, passed over %s", spec, taken, ", ".join(rest) or "none")
            return separator, image, caption
    columns_there = [shown(name[:80]) for name in widest]  # a name may hold rows where its quote is not closed
    raise ValueError(
        f"{spec}: the table needs a column of pictures ({', '.join(IMAGE_COLUMNS)}) and one of captions "
        f"({', '.join(CAPTION_COLUMNS)}), separated by comma, tab, semicolon or bar; "
        f"found {', '.join(columns_there) or 'none'}; others are named as in {spec}#image=NAME,caption=NAME"
    )


def _names(header: list[str], separator: str, spec: str) -> list[str]:
    """Names of the columns: the first row of these lines."""
    try:
        return [name.strip() for name in next(csv.reader(header, delimiter=separator), [])]
    except csv.Error as error:
        raise ValueError(f"{spec}: the header of the table cannot be read: {error}") from error
