"""The samples of a shard and where they lie in it: found once, and kept in a small file.

    00000.tar.fastclip-index    beside the shard, or under another name in `fastclip._env.cache_folder()`

The file is a `_HEAD`, the rows, the keys one after the other, and what is wrong with the shard. It counts as long as
the shard has the size and the modification time for which it was made; one that is damaged, or of another version, is
made anew.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import random
import re
import struct
import tarfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from fastclip import _env
from fastclip.data.picture import PICTURE_SUFFIXES
from fastclip.data.tar_index import BLOCK, Member, read_exactly, tar_members

__all__ = [
    "CLASS",
    "CUT",
    "JSON",
    "REPEATED",
    "ROW",
    "TEXT",
    "UNTOLD",
    "WANTED",
    "ShardIndex",
    "Stamp",
    "index_shards",
    "stamp_of",
]

logger = logging.getLogger(__name__)

# webdataset's: folders and all before the first dot of the name are the key. A name that begins with a dot has none.
_MEMBER = re.compile(r"^((?:.*/|)[^./]+)(\.[^/]*)$", re.DOTALL)

# A sample: of its picture, its caption and its .json the block (of 512 bytes) of the header, the bytes of the data and
# the CRC-32 of the header, 0 where there is none, or it cannot be used; where its key ends among those of the shard;
# its state. 41 bytes.
_MEMBERS = [
    (f"{member}_{what}", "<u4") for member in ("picture", "caption", "json") for what in ("block", "size", "crc")
]
ROW = np.dtype([*_MEMBERS, ("key_end", "<u4"), ("state", "u1")])
Rows = npt.NDArray[Any]
# States: the caption is a text, or JSON, or a class; or there is none; it is the second of its key; the shard ends
# before it does.
TEXT, JSON, CLASS, UNTOLD, REPEATED, CUT = range(6)
_CAPTIONS = {".txt": TEXT, ".json": JSON, ".cls": CLASS}  # members that tell the caption, the first there is
WANTED = "a .txt, a .json or a .cls of the same name must lie in the shard"

_HEAD = struct.Struct("<8sqqqqqI")  # magic, the shard's size and time, bytes of rows, keys and damage, CRC-32 of them
_MAGIC = b"fcindex4"
_THREADS = 16  # they wait for the disk, or for the network behind it


class Stamp(NamedTuple):
    """What changes when a file does."""

    size: int
    mtime_ns: int


class ShardIndex(NamedTuple):
    stamp: Stamp
    rows: Rows  # (n,) of `ROW`
    keys: bytes  # in `os.fsencode`'s form
    damage: str  # of a shard that is not whole, for the log; else ""


def stamp_of(stat: os.stat_result) -> Stamp:
    return Stamp(stat.st_size, stat.st_mtime_ns)


def index_shards(paths: Sequence[str], names: Sequence[str]) -> list[ShardIndex]:
    """The index of every shard, in order; by several threads. The log names those that are not whole.

    Processes that start at once, as the ranks of a run do, each begin elsewhere and find what others have written.

    Args:
        names: what messages call the shards.

    Raises:
        OSError: a shard cannot be opened.
        ValueError: it is no tar file, or holds no pictures, or none that can be used; it is named.
    """
    places = list(range(len(paths)))
    random.Random(os.getpid()).shuffle(places)
    with ThreadPoolExecutor(min(_THREADS, len(paths)) or 1) as pool:
        futures = {place: pool.submit(_shard_index, paths[place], names[place]) for place in places}
        try:
            found = [futures[place].result() for place in range(len(paths))]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for name, index in zip(names, found, strict=True):
        if index.damage:
            logger.warning("%s: %s", name, index.damage)
    return found


def _shard_index(path: str, name: str) -> ShardIndex:
    files = Path(f"{path}.fastclip-index"), _cached(path)
    stamp = stamp_of(os.stat(path))
    for file in files:
        if (kept := _load(file, stamp)) is not None:
            return kept
    with open(path, "rb", buffering=0) as shard:
        before = stamp_of(os.fstat(shard.fileno()))
        found = _build(shard, name)
        if stamp_of(os.fstat(shard.fileno())) != before:
            raise ValueError(f"{name}: the shard changed while it was indexed")
    index = ShardIndex(before, *found)
    for file in files:
        try:
            _store(file, index)
            break
        except OSError as error:
            logger.info("%s: no index could be kept there: %s", file, error)
    return index


def _cached(path: str) -> Path:
    name = hashlib.blake2b(os.fsencode(os.path.realpath(path)), digest_size=16).hexdigest()
    return _env.cache_folder() / "index" / f"{name}.fastclip-index"


def _load(file: Path, stamp: Stamp) -> ShardIndex | None:
    """None where there is none for a shard of this stamp, or a damaged one."""
    try:
        data = file.read_bytes()
    except OSError:
        return None
    if len(data) < _HEAD.size:
        return None
    magic, size, mtime_ns, rows, keys, damage, checksum = _HEAD.unpack_from(data)
    content = memoryview(data)[_HEAD.size :]
    told = magic, Stamp(size, mtime_ns), rows + keys + damage
    if told != (_MAGIC, stamp, len(content)) or zlib.crc32(content) != checksum:
        return None
    rest = bytes(content[rows:])
    return ShardIndex(stamp, np.frombuffer(content[:rows], ROW), rest[:keys], rest[keys:].decode())


def _store(file: Path, index: ShardIndex) -> None:
    """Written under another name first: whoever reads finds all of it or nothing."""
    parts = index.rows.tobytes(), index.keys, index.damage.encode(errors="backslashreplace")
    content = b"".join(parts)
    head = _HEAD.pack(_MAGIC, *index.stamp, *map(len, parts), zlib.crc32(content))
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_name(f".{file.name}.{os.getpid()}-{random.SystemRandom().getrandbits(32):08x}")
    try:
        with half.open("xb") as out:
            out.write(head + content)
        half.replace(file)
    except BaseException:
        half.unlink(missing_ok=True)
        raise


class _Sample(NamedTuple):
    key: str
    state: int
    picture: Member | None = None  # both are there where it can be used
    caption: Member | None = None
    json: Member | None = None


def _build(shard: BinaryIO, name: str) -> tuple[Rows, bytes, str]:
    """Rows, keys and damage of `ShardIndex`."""
    try:
        members, broken = tar_members(shard)
    except tarfile.TarError as error:
        raise ValueError(f"{name}: not a tar file, or one that is cut off: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    samples = _samples(members, shard.seek(0, io.SEEK_END))
    damage = _damage(samples, broken, name)
    rows, keys = np.zeros(len(samples), ROW), [os.fsencode(sample.key) for sample in samples]
    rows["key_end"] = list(accumulate(map(len, keys)))
    rows["state"] = [sample.state for sample in samples]
    for kind in ("picture", "caption", "json"):
        places = [(row, member) for row, sample in enumerate(samples) if (member := getattr(sample, kind)) is not None]
        if large := next((member for _, member in places if member.size >= 2**31), None):
            raise ValueError(f"{name}: {large.name} has {large.size} bytes")
        used = [row for row, _ in places]
        rows[f"{kind}_block"][used] = [member.header // BLOCK for _, member in places]
        rows[f"{kind}_size"][used] = [member.size for _, member in places]
        rows[f"{kind}_crc"][used] = [_header_crc(shard, member) for _, member in places]
    return rows, b"".join(keys), damage


def _header_crc(shard: BinaryIO, member: Member) -> int:
    shard.seek(member.header)
    return zlib.crc32(read_exactly(shard, BLOCK))


def _samples(members: Sequence[Member], end: int) -> list[_Sample]:
    """Every key with a picture, in order; then one more for each that has a member of one name twice."""
    groups: dict[str, dict[str, Member]] = {}
    repeated: dict[str, _Sample] = {}
    for member in members:
        if (match := _MEMBER.match(member.name)) is None:
            continue
        key, kind = match[1], match[2].lower()
        group = groups.setdefault(key, {})
        if kind not in group:
            group[kind] = member
            if kind in PICTURE_SUFFIXES:  # of a .jpg and the .png of its mask the one that comes first
                group.setdefault("picture", member)
        elif kind in PICTURE_SUFFIXES or kind in _CAPTIONS:
            repeated[key] = _Sample(key, REPEATED)
    samples = {key: _sample(key, group, end) for key, group in groups.items() if "picture" in group}
    return [*samples.values(), *(sample for key, sample in repeated.items() if key in samples)]


def _sample(key: str, group: dict[str, Member], end: int) -> _Sample:
    kind = next((kind for kind in _CAPTIONS if kind in group), None)
    picture, caption, told = group["picture"], None if kind is None else group[kind], group.get(".json")
    if any(member.header + BLOCK + member.size > end for member in (picture, caption) if member is not None):
        return _Sample(key, CUT)
    if kind is None:
        return _Sample(key, UNTOLD)
    if told is not None and told.header + BLOCK + told.size > end:
        told = None
    return _Sample(key, _CAPTIONS[kind], picture, caption, told)


def _damage(samples: Sequence[_Sample], broken: str, name: str) -> str:
    """ValueError where there is nothing to use."""
    usable = sum(sample.picture is not None for sample in samples)
    if broken and not usable:
        raise ValueError(f"{name}: not a tar file, or one that is cut off: {broken}")
    if not samples:
        raise ValueError(f"{name}: the shard holds no pictures")
    if not usable:
        untold = sum(sample.state == UNTOLD for sample in samples)
        raise ValueError(f"{name}: none of {untold} pictures has a caption, first {samples[0].key}: {WANTED}")
    return f"cut off or damaged after {usable} samples, which are used: {broken}" if broken else ""
