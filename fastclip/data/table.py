"""Pictures and captions listed in a table, in open_clip's layout."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path

from fastclip.data.faults import BadSample
from fastclip.data.picture import read_picture
from fastclip.data.source import Record
from fastclip.data.strings import Strings

__all__ = ["CAPTION_COLUMNS", "IMAGE_COLUMNS", "Table"]

# The first of them that the table has; open_clip's defaults lead.
IMAGE_COLUMNS = ("filepath", "image", "path", "file_name")
CAPTION_COLUMNS = ("title", "caption", "text")

_SEPARATORS = ",\t;|"


class Table:
    """One sample a row of a .csv or .tsv file in UTF-8, with a header.

    Pictures are in the column `filepath`, `image`, `path` or `file_name`, captions in `title`, `caption` or `text`, in
    any case; other columns are ignored. The header tells the separator: comma, tab, semicolon or bar. Fields are
    quoted as Python's `csv` does. A relative path that does not exist from the working directory is looked for from the
    table's folder. Pictures are opened when they are read.

    Raises:
        OSError: the table cannot be read.
        ValueError: a column is missing, or a row lacks a path, or no row has a caption; the message names the file and
            the line.
    """

    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self._files, self._captions = Strings(), Strings()
        for file, caption in _rows(spec):
            self._files.append(file)
            self._captions.append(caption)
        if not len(self._files):
            raise ValueError(f"{spec}: the table has a header and no rows")
        if not any(self._captions[index] for index in range(len(self))):
            raise ValueError(f"{spec}: all {len(self)} captions are empty")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        return self.read(index)

    def read(self, index: int, *, min_side: int | None = None) -> Record:
        """As `fastclip.data.source.read_sample`."""
        captions, key = self.captions(index), self.key(index)
        return Record(read_picture(self._file(index), key, min_side=min_side), captions, key)

    def captions(self, index: int) -> tuple[str, ...]:
        if not self._captions[index]:
            raise BadSample("empty caption", self.key(index), "its caption is empty")
        return (self._captions[index],)

    def key(self, index: int) -> str:
        return self._files[index]

    def picture_bytes(self, index: int) -> bytes:
        """As `fastclip.data.source.picture_bytes`."""
        return self._file(index).read_bytes()

    def picture_place(self, index: int) -> tuple[str, str]:
        """As `fastclip.data.source.picture_place`."""
        return str(self._file(index)), ""

    def _file(self, index: int) -> Path:
        """The picture's, from here or from the table's folder; BadSample where there is none."""
        path = Path(self._files[index])
        if path.is_absolute() or os.path.exists(path):  # which takes names that are too long for the system
            return path
        beside = Path(self.spec).parent / path
        if not os.path.exists(beside):
            where = f"no such file, neither from here nor from the folder of {self.spec}"
            raise BadSample("missing file", self.key(index), where)
        return beside


def _rows(spec: str) -> Iterator[tuple[str, str]]:
    """Path and caption of every row."""
    line = 1  # where the row begins
    with open(spec, encoding="utf-8-sig", newline="") as file:
        try:
            separator, image, caption = _columns(file.readline(), spec)
            file.seek(0)
            rows = csv.reader(file, delimiter=separator, strict=True)  # else an open quote swallows the rows after it
            width = len(next(rows))
            line = rows.line_num + 1
            for row in rows:
                if row:  # not a blank line
                    yield _checked(row, width, image, caption, f"{spec}, line {line}")
                line = rows.line_num + 1
        except csv.Error as error:
            raise ValueError(f"{spec}, line {line}: {error}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{spec}, line {line} or later: not UTF-8: {error}") from error


def _checked(row: list[str], width: int, image: int, caption: int, where: str) -> tuple[str, str]:
    if len(row) != width:
        raise ValueError(f"{where}: {len(row)} fields, the header has {width}")
    path, text = row[image].strip(), row[caption].strip()
    if not path:
        raise ValueError(f"{where}: the path is empty")
    return path, text


def _columns(header: str, spec: str) -> tuple[str, int, int]:
    """The separator, and the places of the pictures' and the captions' columns."""
    widest: list[str] = []
    for separator in _SEPARATORS:
        names = [name.strip() for name in next(csv.reader([header], delimiter=separator), [])]
        lower = [name.lower() for name in names]
        image = next((lower.index(name) for name in IMAGE_COLUMNS if name in lower), None)
        caption = next((lower.index(name) for name in CAPTION_COLUMNS if name in lower), None)
        if image is not None and caption is not None:
            return separator, image, caption
        widest = max(widest, names, key=len)
    raise ValueError(
        f"{spec}: the table needs a column of pictures ({', '.join(IMAGE_COLUMNS)}) and one of captions "
        f"({', '.join(CAPTION_COLUMNS)}), separated by comma, tab, semicolon or bar; "
        f"found {', '.join(widest) or 'none'}"
    )
