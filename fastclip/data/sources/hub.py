"""Datasets of Hugging Face's `datasets` library."""

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
    """The rows of ``hf:NAME`` or ``hf:NAME:SPLIT``, one sample per row. The default split is train.

    NAME is a dataset of the Hub or a local folder, as for ``datasets.load_dataset``, or a folder that ``save_to_disk``
    has written. Images are in the first column of the type `datasets.Image`, or in a column `filepath`,
    `image`, `path` or `file_name`. Captions are strings or lists of strings in `title`, `caption`, `text` or
    `captions`. ``hf:NAME#image=A,caption=B`` names other columns. A column `label` of the type `datasets.ClassLabel`
    gives the classes. Without a column of captions, the captions are "a photo of a CLASS" with the class name. A format
    that `Dataset.set_format` saved with the data is ignored.

    Raises:
        ValueError: a column or the split is missing, there are no rows, or `datasets` cannot interpret the data.
        OSError: the dataset does not exist or cannot be read.
    """

    templates: tuple[str, ...] = ()

    def __init__(self, spec: str, path: str | None = None, *, columns: Named = UNNAMED) -> None:
        self.spec = spec
        name, _, split = (path or spec).removeprefix("hf:").partition(":")
        rows = _load(name, split or "train", spec).with_format(None)  # a saved format may omit or convert columns
        if not len(rows):
            raise ValueError(f"{spec}: the dataset has no rows")
        self._folder = Path(name) if os.path.isdir(name) else Path()
        self._image, self._caption = _columns(rows.features, spec, columns)
        label = rows.features.get(_LABEL)
        self._label = _LABEL if isinstance(label, datasets.ClassLabel) else None
        self.class_names: tuple[str, ...] = tuple(label.names) if self._label else ()
        if self._caption is None and self._label is None:
            raise ValueError(f"{spec}: no column of captions ({', '.join(_CAPTIONS)}) {_has(rows.features)}")
        texts = [column for column in (self._caption, self._label) if column is not None]
        self._texts = rows.select_columns(texts)  # without images, so that captions are read without them
        rows = rows.select_columns([self._image, *texts])
        try:
            # Not decoded by the library: `read_picture` names the causes of failures.
            self._rows = rows.cast_column(self._image, datasets.Image(decode=False))
        except Exception as error:  # pyarrow raises many kinds of errors for columns of other types
            raise ValueError(f"{spec}: the column {self._image} holds no images: {error}") from error
        self._cache: str = next((file["filename"] for file in self._rows.cache_files), "")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        return self.read(index)

    def read(self, index: int, *, min_side: int | None = None) -> Record:
        """Return sample `index`; see `fastclip.data.source.read_sample`."""
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
        """Return the bytes of the row's image."""
        data = self._picture(self._rows[index], self.key(index))
        return read_file(self._file(data["path"])) if data["bytes"] is None else data["bytes"]

    def _picture(self, row: dict[str, Any], key: str) -> dict[str, Any]:
        """Return the row's image with "bytes" or "path". Raises BadSample if it has neither."""
        data = row[self._image]
        if data is None or (data["bytes"] is None and data["path"] is None):
            raise BadSample("no image", key, "the row has no image")
        return data

    def _file(self, name: str) -> Path:
        """Return the file that a row names: in the dataset's folder, or else relative to the working directory."""
        beside = self._folder / name
        return beside if beside.exists() else Path(name)

    def picture_place(self, index: int) -> tuple[str, str]:
        """Return the file and the row of the image; see `fastclip.data.source.picture_place`.

        The row's name includes the library's fingerprint, which identifies the rows.
        """
        path = self._paths[index].as_py()
        file = self._cache if path is None else str(self._file(path))
        return file, f"row {index} of {self._rows._fingerprint}"

    @cached_property
    def _paths(self) -> Any:
        """The path of the image for each row that holds no bytes, else null. Arrow reads no images for this."""
        stored = self._rows.data.column(self._image)
        paths = pc.struct_field(stored, "path")
        alone = pc.is_null(pc.struct_field(stored, "bytes"))
        return pc.if_else(alone, paths, pa.scalar(None, paths.type)).combine_chunks()

    def _captions(self, row: dict[str, Any], key: str) -> tuple[str, ...]:
        value = None
        if self._caption is not None:
            value = row[self._caption]
        elif row[_LABEL] not in (None, -1):  # the library marks a row without a label with -1
            value = class_captions(self.class_names[row[_LABEL]], self.templates)
        return given_captions(value, key, self._caption or "its class's name")


def _load(name: str, split: str, spec: str) -> Any:
    """Return the split as a `datasets.Dataset`."""
    folder = Path(name)
    try:
        if os.path.isfile(folder / "dataset_dict.json"):
            splits = list(map(str, read_json(folder / "dataset_dict.json")["splits"]))
            if split not in splits:
                raise ValueError(f"there is no split {split}; splits are {', '.join(splits)}")
            folder /= split  # loaded alone, because the library fails if another split is empty
        elif not os.path.isfile(folder / "state.json"):
            return datasets.load_dataset(name, split=split)
        if not read_json(folder / "state.json").get("_data_files", True):
            raise ValueError("the dataset has no rows")
        return datasets.load_from_disk(str(folder))
    except OSError as error:
        raise OSError(f"{spec}: {error}") from error
    except Exception as error:  # the library's readers raise many kinds of errors
        raise ValueError(f"{spec}: {error}") from error


def _columns(features: Any, spec: str, columns: Named) -> tuple[str, str | None]:
    """Return the names of the columns of images and of captions, the latter None if there is none."""
    names = list(features)
    pictures = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    known = [name.lower() for name in pictures] or IMAGE_COLUMNS
    image = choose(names, "image", known, columns.image, spec)
    if image is None:
        raise ValueError(f"{spec}: no column of images {_has(features)}")
    caption = choose(names, "caption", _CAPTIONS, columns.caption, spec)
    return names[image], None if caption is None else names[caption]


def _has(features: Any) -> str:
    return f"among {', '.join(features)}"
