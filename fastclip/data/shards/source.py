"""Read images and captions from tar shards in the layout of webdataset and img2dataset."""

from __future__ import annotations

import glob
import io
import logging
import os
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from fastclip.data.classes.prompts import read_class_names, read_templates
from fastclip.data.faults import BadSample, Tally
from fastclip.data.files import open_file
from fastclip.data.picture import read_picture
from fastclip.data.shards.braces import brace_names
from fastclip.data.shards.index import index_shards, stamp_of
from fastclip.data.shards.samples import CLASS, FAULTS, JSON, TEXT, UNTOLD
from fastclip.data.shards.tar_index import BLOCK, read_exactly
from fastclip.data.source import Record, class_captions
from fastclip.data.sources.captions import first_captions, json_captions, json_fields, text_captions

__all__ = ["Shards", "shard_paths"]

logger = logging.getLogger(__name__)
_MEMBERS = {TEXT: "text", JSON: "json", CLASS: "number"}  # names in a row of the index
_LOOKED_AT = 3  # samples whose .json is inspected for a caption


def shard_paths(pattern: str, problems: list[str] | None = None) -> list[str]:
    """Return the files that a path, a glob or a pattern with braces (``{00000..00009}``) stands for, each once.

    A pattern may contain both braces and globs. Braces keep their order, and the matches of a glob are sorted. As in a
    shell, a glob matches no hidden files. Folders are left out.

    Args:
        problems: a list that receives the names of missing files, if other files exist.

    Raises:
        ValueError: a file is missing, or a glob matches no file.
    """
    if os.path.isfile(pattern):
        return [pattern]
    names, files, missing = brace_names(pattern), list[str](), []
    for name in names:
        # A broken link is kept, so that opening it reports the missing shard.
        paths = sorted(path for path in glob.glob(name, recursive=True) if not os.path.isdir(path))
        paths = paths or ([name] if os.path.isfile(name) else [])
        files += paths
        missing += [] if paths else [name]
    if missing and files and problems is not None:
        problems += [f"no such shard: {name}" for name in missing]
    elif missing:
        what = (
            f"{len(missing)} of {len(names)} names have no file, such as {missing[0]}" if len(names) > 1 else "no file"
        )
        raise ValueError(f"no such shards: {pattern}: {what}")
    return list(dict.fromkeys(files))


class Shards:
    """Samples of tar shards, with random access and without unpacking the shards.

    A sample consists of an image ``KEY.jpg`` (or .png, .webp ...) and at least one of ``KEY.txt`` with one caption,
    ``KEY.json`` with captions in "caption", and ``KEY.cls`` with the number of a class. The captions are those of the
    first of these members, in this order, that holds any. The log counts all other members by kind. Class names and
    templates are read from ``classnames.txt`` and ``zeroshot_classification_templates.txt``, as CLIP_benchmark writes
    them, in the folder of the first shard or its parent.

    Each shard is scanned once for the places of its members, which are then stored (`fastclip.data.shards.index`). They
    take about 60 bytes of memory per sample, which worker processes share.

    If a key has a member twice, the first is used, and an additional unusable sample is counted for the second. An
    image without a caption, or with data beyond the end of its shard, is an unusable sample too. A shard that is cut
    off is used as far as it can be read, and named in the log.

    Args:
        spec: the shards' name on the command line, as the user wrote it.
        paths: the files of the shards, in order.
        names: the names by which messages refer to the shards (default: `paths`).
        class_names: class names to use if there is no classnames.txt.
        caption: the field of the .json members that holds the captions; .txt and .cls are then not read. With ""
            the captions are read from .txt, "caption" of .json, and .cls, as described above.
        problems: a list for messages, as in `fastclip.data.shards.index.index_shards`.

    Raises:
        OSError: a shard cannot be opened.
        ValueError: a shard is not a tar file or holds no usable sample (the message names it), or the shards have
            classes, but neither captions nor class names. Also raised while a sample is read, if its shard has changed
            since it was opened.
    """

    def __init__(
        self,
        spec: str,
        paths: Sequence[str],
        names: Sequence[str] | None = None,
        *,
        class_names: Sequence[str] = (),
        caption: str = "",
        problems: list[str] | None = None,
    ) -> None:
        self.spec, self._field = spec, caption
        shards = zip(paths, names or paths, index_shards(paths, names or paths, problems), strict=True)
        used = [(path, name, index) for path, name, index in shards if index is not None]
        if not used:
            raise ValueError(problems.pop() if problems else f"{spec}: none of {len(paths)} shards can be used")
        self._paths, self._names, indices = zip(*used, strict=True)
        self._stamps = [index.stamp for index in indices]
        self._rows = np.concatenate([index.rows for index in indices])
        self._keys = b"".join(index.keys for index in indices)
        self._starts = list(accumulate((len(index.rows) for index in indices), initial=0))  # of every shard, in `_rows`
        self._key_starts = list(accumulate((len(index.keys) for index in indices), initial=0))  # in `_keys`
        self.passed = Tally()
        for name, index in zip(self._names, indices, strict=True):
            keys = {cause: [f"{name}: {key}" for key in keys] for cause, keys in index.passed.keys.items()}
            self.passed.merge(index.passed.counts, keys)
        if self.passed.total:
            logger.warning("%s: ignored members that belong to no sample: %s", spec, self.passed)
        self.class_names: tuple[str, ...] = ()
        self.templates: tuple[str, ...] = ()
        if self._has_classes():
            self.class_names, self.templates = _classes(Path(paths[0]).parent, class_names)
        if not self.class_names:
            states = self._rows["state"]
            classed = states == CLASS
            if classed.any() and not ((states < UNTOLD) & ~classed).any():
                raise ValueError(
                    f"{spec}: the images have classes but no captions, and there is no classnames.txt beside the "
                    "shards: add one with the name of one class per line"
                )
            states[classed] = UNTOLD

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        return self.read(index)

    def read(self, index: int, *, min_side: int | None = None) -> Record:
        """Return sample `index`; see `fastclip.data.source.read_sample`."""
        picture, *first = self._members(index, ("picture", *self._kinds(index)[:1]))
        key = self.key(index)
        captions, label = self._captions(index, first)
        return Record(read_picture(io.BytesIO(picture), key, min_side=min_side), captions, key, label)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions(index, self._members(index, self._kinds(index)[:1]))[0]

    def picture_bytes(self, index: int) -> bytes:
        """Return the bytes of the image's member."""
        return self._members(index, ("picture",))[0]

    def picture_place(self, index: int) -> tuple[str, str]:
        """Return the shard's path and the image's key in it; see `fastclip.data.source.picture_place`."""
        return self._paths[self._shard(index)], self._name(index)

    def fields(self, index: int) -> dict[str, Any]:
        """Return the fields of the sample's .json; see `fastclip.data.source.sample_fields`."""
        self._shard(index)  # raises IndexError if `index` is out of range
        return json_fields(self._members(index, ("json",))[0]) if self._rows["json_size"][index] else {}

    def _has_classes(self) -> bool:
        """Return True if the captions of some samples come only from their class (no .txt, no caption in .json)."""
        states = self._rows["state"]
        if self._field:
            return False
        if bool((states == CLASS).any()):
            return True
        both = np.flatnonzero(states == JSON + CLASS)[:_LOOKED_AT].tolist()
        return any("caption" not in json_fields(self._members(k, ("json",))[0], without=()) for k in both)

    def _kinds(self, index: int) -> list[str]:
        """Return the members that may hold a sample's captions, in order of precedence."""
        self._shard(index)  # raises IndexError if `index` is out of range
        state = int(self._rows["state"][index])
        kinds = [member for bit, member in _MEMBERS.items() if state & bit] if state < UNTOLD else []
        if self._field:
            return [kind for kind in kinds if kind == "json"]
        return kinds if self.class_names or kinds == ["number"] else [kind for kind in kinds if kind != "number"]

    def _captions(self, index: int, data: list[bytes]) -> tuple[tuple[str, ...], int | None]:
        """Return captions and label. `data` holds the content of the first of `_kinds`."""
        key, kinds = self.key(index), self._kinds(index)
        if not kinds:
            raise BadSample("no caption", key, f'it has no .json with the field "{self._field}"')

        def read(kind: str) -> tuple[tuple[str, ...], int | None]:
            content = data[0] if kind == kinds[0] else self._members(index, (kind,))[0]
            if kind == "json":
                return json_captions(content, key, self._field or "caption"), None
            if kind == "text":
                return text_captions(content, key, lines=False), None
            label = self._label(content, key)
            return class_captions(self.class_names[label], self.templates), label

        return first_captions([partial(read, kind) for kind in kinds])

    def _label(self, data: bytes, key: str) -> int:
        text = data.strip()
        if not (text.isdigit() and len(text) < 10 and int(text) < len(self.class_names)):
            what = f"its .cls must contain a number from 0 to {len(self.class_names) - 1}, got {text[:20]!r}"
            raise BadSample("damaged class", key, what)
        return int(text)

    def _shard(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"{index} of {len(self)}")
        return bisect_right(self._starts, index) - 1

    def key(self, index: int) -> str:
        return f"{self._names[self._shard(index)]}: {self._name(index)}"

    def _name(self, index: int) -> str:
        """Return the name of the sample's members in their shard, without a suffix."""
        shard, ends = self._shard(index), self._rows["key_end"]
        start = self._key_starts[shard]
        first = int(ends[index - 1]) if index > self._starts[shard] else 0
        return os.fsdecode(self._keys[start + first : start + int(ends[index])])

    def _members(self, index: int, kinds: Sequence[str]) -> list[bytes]:
        """Return the data of these members of a sample. Raises BadSample if the index marks the sample as unusable."""
        shard, row, contents = self._shard(index), self._rows[index], []
        if (fault := FAULTS.get(int(row["state"]))) is not None:
            cause, reason = fault
            raise BadSample(cause, self.key(index), reason)
        try:
            # Opened for each sample: forked workers would share the position in a file that the parent had opened.
            with open_file(self._paths[shard], buffering=0) as file:
                same = stamp_of(os.fstat(file.fileno())) == self._stamps[shard]
                for kind in kinds if same else ():
                    file.seek(int(row[f"{kind}_block"]) * BLOCK)
                    data = read_exactly(file, BLOCK + int(row[f"{kind}_size"]))
                    same &= len(data) == BLOCK + row[f"{kind}_size"] and zlib.crc32(data[:BLOCK]) == row[f"{kind}_crc"]
                    contents.append(data[BLOCK:])
        except OSError as error:
            raise OSError(f"{self.key(index)}: {error.strerror}") from error
        if not same:
            raise ValueError(
                f"{self.key(index)}: the shard has changed since it was opened: run again when nothing writes to it"
            )
        return contents


def _classes(folder: Path, class_names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the class names and the templates of the shards in `folder`, or () for what is missing.

    `class_names` are used if there is no classnames.txt.
    """
    for place in (folder, folder.parent):
        names, templates = place / "classnames.txt", place / "zeroshot_classification_templates.txt"
        if names.is_file() or (class_names and templates.is_file()):
            class_names = read_class_names(str(names)) if names.is_file() else class_names
            return tuple(class_names), read_templates(str(templates)) if templates.is_file() else ()
    return tuple(class_names), ()
