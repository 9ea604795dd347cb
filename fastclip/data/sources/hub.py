"""Data sets of Hugging Face's `datasets` library."""

from __future__ import annotations

import io
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from fastclip.data.faults import BadSample
from fastclip.data.files import read_file
from fastclip.data.picture import read_picture
from fastclip.data.source import Record, class_captions
from fastclip.data.sources.captions import given_captions
from fastclip.data.sources.columns import CAPTION_COLUMNS, IMAGE_COLUMNS, UNNAMED, Named, choose
from fastclip.system.reading import read_json

__all__ = ["HubSource"]

_CAPTIONS = (*CAPTION_COLUMNS, "captions")
_LABEL = "label"


class HubSource:
    """One sample a row of ``hf:NAME`` or ``hf:NAME:SPLIT``; the split is train where none is named.

    NAME is what ``datasets.load_dataset`` takes, a data set of the Hub or a local folder, or the folder of
    ``save_to_disk``. Pictures are in the first column of pictures, or in one with a name of `Table`'s columns; captions
    in `title`, `caption`, `text` or `captions`, strings or lists of strings; ``hf:NAME#image=A,caption=B`` names them.
    A column `label` of class names gives the classes, and captions ("a photo of a NAME") where there are none. A format
    that was saved with the data is not applied.

    Raises:
        ValueError: a column or the split is missing, or there are no rows, or `datasets` cannot make sense of the data.
        OSError: there is no such data set, or it cannot be read.
    """

    templates: tuple[str, ...] = ()

    def __init__(self, spec: str, path: str | None = None, *, columns: Named = UNNAMED) -> None:
        self.spec = spec
        name, _, split = (path or spec).removeprefix("hf:").partition(":")
        rows = _load(name, split or "train", spec).with_format(None)  # else columns may be missing, or arrays
        if not len(rows):
            raise ValueError(f"{spec}: the data set has no rows")
        self._folder = Path(name) if os.path.isdir(name) else Path()
        self._image, self._caption = _columns(rows.features, spec, columns)
        label = rows.features.get(_LABEL)
        self._label = _LABEL if isinstance(label, datasets.ClassLabel) else None
        self.class_names: tuple[str, ...] = tuple(label.names) if self._label else ()
        if self._caption is None and self._label is None:
            raise ValueError(f"{spec}: no column of captions ({', '.join(_CAPTIONS)}) {_has(rows.features)}")
        texts = [column for column in (self._caption, self._label) if column is not None]
        self._texts = rows.select_columns(texts)  # captions alone, for which no picture is read
        rows = rows.select_columns([self._image, *texts])
        try:
            self._rows = rows.cast_column(self._image, datasets.Image(decode=False))  # read_picture names what fails
        except Exception as error:  # pyarrow's, of columns that hold no pictures
            raise ValueError(f"{spec}: the column {self._image} holds no pictures: {error}") from error
        self._cache: str = next((file["filename"] for file in self._rows.cache_files), "")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        return self.read(index)

    def read(self, index: int, *, min_side: int | None = None) -> Record:
        """As `fastclip.data.source.read_sample`."""
        key, row = self.key(index), self._rows[index]
        captions, data = self._captions(row, key), self._picture(row, key)
        file = self._file(data["path"]) if data["bytes"] is None else io.BytesIO(data["bytes"])
        label = None if self._label is None else row[self._label]
        return Record(read_picture(file, key, min_side=min_side), captions, key, None if label == -1 else label)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions(self._texts[index], self.key(index))

    def key(self, index: int) -> str:
        return f"{self.spec}, row {index}"

    def picture_bytes(self, index: int) -> bytes:
        """As `fastclip.data.source.picture_bytes`."""
        data = self._picture(self._rows[index], self.key(index))
        return read_file(self._file(data["path"])) if data["bytes"] is None else data["bytes"]

    def _picture(self, row: dict[str, Any], key: str) -> dict[str, Any]:
        """Return the row's picture with its "bytes" or its "path"; BadSample if it has neither."""
        data = row[self._image]
        if data is None or (data["bytes"] is None and data["path"] is None):
            raise BadSample("no image", key, "there is no picture")
        return data

    def _file(self, name: str) -> Path:
        """Return the file of a picture that the row only names: in the data's folder, else in the working directory."""
        beside = self._folder / name
        return beside if beside.exists() else Path(name)

    def picture_place(self, index: int) -> tuple[str, str]:
        """As `fastclip.data.source.picture_place`; the library's fingerprint says which rows these are."""
        path = self._paths[index].as_py()
        file = self._cache if path is None else str(self._file(path))
        return file, f"row {index} of {self._rows._fingerprint}"

    @cached_property
    def _paths(self) -> Any:
        """The path of each row's picture where the row holds no bytes, else null; arrow reads no picture for this."""
        stored = self._rows.data.column(self._image)
        paths = pc.struct_field(stored, "path")
        alone = pc.is_null(pc.struct_field(stored, "bytes"))
        return pc.if_else(alone, paths, pa.scalar(None, paths.type)).combine_chunks()

    def _captions(self, row: dict[str, Any], key: str) -> tuple[str, ...]:
        value = None
        if self._caption is not None:
            value = row[self._caption]
        elif row[_LABEL] not in (None, -1):  # -1 is the library's mark of a row without a label
            value = class_captions(self.class_names[row[_LABEL]], self.templates)
        return given_captions(value, key, self._caption or "its class's name")


def _load(name: str, split: str, spec: str) -> Any:
    """A `datasets.Dataset`."""
    folder = Path(name)
    try:
        if os.path.isfile(folder / "dataset_dict.json"):
            splits = list(map(str, read_json(folder / "dataset_dict.json")["splits"]))
            if split not in splits:
                raise ValueError(f"there is no split {split}; splits are {', '.join(splits)}")
            folder /= split  # alone: the library fails where another one is empty
        elif not os.path.isfile(folder / "state.json"):
            return datasets.load_dataset(name, split=split)
        if not read_json(folder / "state.json").get("_data_files", True):
            raise ValueError("the data set has no rows")
        return datasets.load_from_disk(str(folder))
    except OSError as error:
        raise OSError(f"{spec}: {error}") from error
    except Exception as error:  # what its readers meet
        raise ValueError(f"{spec}: {error}") from error


def _columns(features: Any, spec: str, columns: Named) -> tuple[str, str | None]:
    """Return the names of the columns of pictures and of captions."""
    names = list(features)
    pictures = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    known = [name.lower() for name in pictures] or IMAGE_COLUMNS
    image = choose(names, "image", known, columns.image, spec)
    if image is None:
        raise ValueError(f"{spec}: no column of pictures {_has(features)}")
    caption = choose(names, "caption", _CAPTIONS, columns.caption, spec)
    return names[image], None if caption is None else names[caption]


def _has(features: Any) -> str:
    return f"among {', '.join(features)}"
