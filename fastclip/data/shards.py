"""Pictures and captions in tar files, in the layout of webdataset and img2dataset."""

from __future__ import annotations

import glob
import io
import logging
import re
import tarfile
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from braceexpand import braceexpand

from fastclip.data.faults import BadSample
from fastclip.data.picture import PICTURE_SUFFIXES, json_captions, read_picture, text_captions
from fastclip.data.source import Record
from fastclip.data.strings import Strings

__all__ = ["Shards", "shard_paths"]

logger = logging.getLogger(__name__)

# webdataset's: folders and all before the first dot of the name are the key. A name that begins with a dot has none.
_MEMBER = re.compile(r"^((?:.*/|)[^./]+)(\.[^/]*)$", re.DOTALL)
_KINDS = ("picture", ".txt", ".json")

_Place = tuple[int, int]  # offset and size in bytes, inside a shard
_WANTED = "a .txt or a .json of the same name must lie in the shard"
_NONE, _CUT = -1, -2  # sizes of what is not there, and of what the shard's end has cut off


def shard_paths(pattern: str) -> list[str]:
    """Files of a path, a glob, a brace pattern (``{00000..00009}``) or a mixture, each once.

    Braces keep their order, a glob is sorted. Raises ValueError when a file is missing or a glob finds nothing.
    """
    if Path(pattern).is_file():
        return [pattern]
    try:
        names = list(braceexpand(pattern))
    except ValueError as error:
        raise ValueError(f"{pattern}: {error}") from error
    found, missing = [], []
    for name in names:
        paths = sorted(glob.glob(name, recursive=True)) or ([name] if Path(name).is_file() else [])
        found += paths
        missing += [] if paths else [name]
    if missing:
        what = f"{len(missing)} of {len(names)} names have no file, first {missing[0]}" if len(names) > 1 else "no file"
        raise ValueError(f"no such shards: {pattern}: {what}")
    return list(dict.fromkeys(found))


class Shards:
    """Samples of tar files: members ``KEY.jpg`` (or .png, .webp ...) with ``KEY.txt`` or ``KEY.json`` with "caption".

    A .txt holds one caption and goes before a .json; other members are ignored. Every shard is gone through once, for
    the places of its members; then samples are read from it at random, and nothing is unpacked on the disk. Where a key
    has a member twice the first one counts, and a sample stands for the second that cannot be used. So does one for a
    picture without a caption, or of which the end of the shard is missing: a shard that is cut off is used as far as it
    goes, and named in the log.

    Args:
        spec: as the user wrote it.
        paths: of the shards, in order.

    Raises:
        OSError: a shard cannot be opened.
        ValueError: it is no tar file, or holds no pictures, or none with a caption; it is named.
    """

    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    def __init__(self, spec: str, paths: Sequence[str]) -> None:
        self.spec = spec
        self._paths = tuple(paths)
        self._keys = Strings()
        places = array("q")
        self._ends: list[int] = []  # of every shard, the number of samples up to its end
        for path in self._paths:
            for key, found in _read_index(path):
                self._keys.append(key)
                for kind in _KINDS:
                    places.extend(found.get(kind, (0, _NONE)))
            self._ends.append(len(self._keys))
        self._places = np.array(places).reshape(-1, len(_KINDS), 2)  # offset and size

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Record:
        captions, key = self.captions(index), self.key(index)
        data = self._read(index, 0)
        assert data is not None  # what has captions has a picture
        return Record(read_picture(io.BytesIO(data), key), captions, key)

    def captions(self, index: int) -> tuple[str, ...]:
        key = self.key(index)
        if (text := self._read(index, 1)) is not None:
            return text_captions(text, key, lines=False)
        if (data := self._read(index, 2)) is not None:
            return json_captions(data, key)
        if self._read(index, 0) is None:
            raise BadSample("duplicate member", key, "the shard has this sample twice, of which the first counts")
        raise BadSample("no caption", key, f"it has no caption: {_WANTED}")

    def _path(self, index: int) -> str:
        return self._paths[bisect_right(self._ends, index)]

    def key(self, index: int) -> str:
        return f"{self._path(index)}: {self._keys[index]}"

    def _read(self, index: int, kind: int) -> bytes | None:
        """A member's bytes, None where the sample has none of this `_KINDS`."""
        offset, size = map(int, self._places[index, kind])
        if size == _NONE:
            return None
        if size == _CUT:
            raise BadSample("cut shard", self.key(index), "the shard ends before it does")
        try:
            # opened anew: a place in an open file would be shared with the processes that fork made
            with open(self._path(index), "rb", buffering=0) as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise OSError(f"{self.key(index)}: {error.strerror}") from error
        if len(data) < size:
            raise ValueError(f"{self.key(index)}: the shard has become shorter since it was opened")
        return data


def _read_index(path: str) -> list[tuple[str, dict[str, _Place]]]:
    """Key, and kind -> place, of every sample of a shard; of a second one of the same key there are no places."""
    groups: dict[str, dict[str, _Place]] = {}
    repeated: dict[str, dict[str, _Place]] = {}
    size, broken = Path(path).stat().st_size, ""
    try:
        with tarfile.open(path, "r:") as tar:
            try:
                for member in tar:
                    match = _MEMBER.match(member.name)
                    if not member.isfile() or match is None:
                        continue
                    kind = match[2].lower()
                    kind = "picture" if kind in PICTURE_SUFFIXES else kind
                    group = groups.setdefault(match[1], {})
                    if kind in group and kind in _KINDS:
                        repeated[match[1]] = {}
                        continue
                    whole = member.offset_data + member.size <= size
                    group[kind] = (member.offset_data, member.size if whole else _CUT)
                broken = "" if _ends_well(path, tar.offset) else "no header where one must be"
            except tarfile.TarError as error:
                broken = str(error)
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a tar file, or one that is cut off: {error}") from error
    samples = {key: group for key, group in groups.items() if "picture" in group}
    told = {key: group for key, group in samples.items() if {".txt", ".json"} & group.keys()}
    intact = sum(all(end != _CUT for _, end in group.values()) for group in told.values())
    if broken and not intact:
        raise ValueError(f"{path}: not a tar file, or one that is cut off: {broken}")
    if not samples:
        raise ValueError(f"{path}: the shard holds no pictures")
    if not told:
        raise ValueError(
            f"{path}: none of {len(samples)} pictures has a caption, first {next(iter(samples))}: {_WANTED}"
        )
    if broken:
        logger.warning("%s: cut off or damaged after %d samples, which are used: %s", path, intact, broken)
    return [*samples.items(), *((key, group) for key, group in repeated.items() if key in samples)]


def _ends_well(path: str, offset: int) -> bool:
    """Whether a shard ends at `offset`: with a block of zeros, or, as some writers leave it, with the file."""
    with open(path, "rb") as file:
        file.seek(offset)
        return not file.read(tarfile.BLOCKSIZE).strip(b"\0")
