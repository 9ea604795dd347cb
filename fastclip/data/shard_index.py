"""The samples of a shard and where they lie in it: found once, and kept in a small file.

    00000.tar.fastclip-index    beside the shard, or under another name in `fastclip._env.cache_folder()`

The file is a `_HEAD`, the rows, and the keys one after the other. It counts as long as the shard has the size and the
modification time for which it was made; one that is damaged, or of another version, is made anew.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
import struct
import tarfile
import zlib
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from fastclip import _env
from fastclip.data.picture import PICTURE_SUFFIXES
from fastclip.data.tar_index import BLOCK, Member, tar_members

__all__ = ["ROW", "ShardIndex", "Stamp", "index_shards", "stamp_of"]

logger = logging.getLogger(__name__)

# webdataset's: folders and all before the first dot of the name are the key. A name that begins with a dot has none.
_MEMBER = re.compile(r"^((?:.*/|)[^./]+)(\.[^/]*)$", re.DOTALL)

# A sample: of its picture and its caption the block (of 512 bytes) of the header, the bytes of the data and the CRC-32
# of the header; where its key ends among those of the shard; whether the caption is JSON. 29 bytes.
_MEMBERS = [(f"{member}_{what}", "<u4") for member in ("picture", "caption") for what in ("block", "size", "crc")]
ROW = np.dtype([*_MEMBERS, ("key_end", "<u4"), ("json", "u1")])
Rows = npt.NDArray[Any]

_HEAD = struct.Struct("<8sqqqqI")  # magic, the shard's size and time, bytes of rows and of keys, CRC-32 of both
_MAGIC = b"fcindex1"
_THREADS = 16  # they wait for the disk, or for the network behind it


class Stamp(NamedTuple):
    """What changes when a file does."""

    size: int
    mtime_ns: int


class ShardIndex(NamedTuple):
    stamp: Stamp
    rows: Rows  # (n,) of `ROW`
    keys: bytes  # in `os.fsencode`'s form


def stamp_of(stat: os.stat_result) -> Stamp:
    return Stamp(stat.st_size, stat.st_mtime_ns)


def index_shards(paths: Sequence[str], names: Sequence[str]) -> list[ShardIndex]:
    """The index of every shard, in order; by several threads.

    Processes that start at once, as the ranks of a run do, each begin elsewhere and find what others have written.

    Args:
        names: what messages call the shards.

    Raises:
        OSError: a shard cannot be opened.
        ValueError: it is no tar file, or cut off, or holds no samples, or pictures without captions; it is named.
    """
    places = list(range(len(paths)))
    random.Random(os.getpid()).shuffle(places)
    with ThreadPoolExecutor(min(_THREADS, len(paths)) or 1) as pool:
        futures = {place: pool.submit(_shard_index, paths[place], names[place]) for place in places}
        try:
            return [futures[place].result() for place in range(len(paths))]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


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
    magic, size, mtime_ns, rows, keys, checksum = _HEAD.unpack_from(data)
    content = memoryview(data)[_HEAD.size :]
    if (magic, Stamp(size, mtime_ns), rows + keys) != (_MAGIC, stamp, len(content)) or zlib.crc32(content) != checksum:
        return None
    return ShardIndex(stamp, np.frombuffer(content[:rows], ROW), bytes(content[rows:]))


def _store(file: Path, index: ShardIndex) -> None:
    """Written under another name first: whoever reads finds all of it or nothing."""
    content = index.rows.tobytes() + index.keys
    head = _HEAD.pack(_MAGIC, *index.stamp, index.rows.nbytes, len(index.keys), zlib.crc32(content))
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_name(f".{file.name}.{os.getpid()}-{random.SystemRandom().getrandbits(32):08x}")
    try:
        with half.open("xb") as out:
            out.write(head + content)
        half.replace(file)
    except BaseException:
        half.unlink(missing_ok=True)
        raise


def _build(shard: BinaryIO, name: str) -> tuple[Rows, bytes]:
    try:
        members = tar_members(shard)
    except tarfile.TarError as error:
        raise ValueError(f"{name}: not a tar file, or one that is cut off: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    samples = _samples(members, name)
    rows, ends, keys = np.zeros(len(samples), ROW), array("q"), bytearray()
    for kind in ("picture", "caption"):
        found = [sample.picture if kind == "picture" else sample.caption for sample in samples.values()]
        if large := next((member for member in found if member.size >= 2**31), None):
            raise ValueError(f"{name}: {large.name} has {large.size} bytes")
        rows[f"{kind}_block"] = [member.header // BLOCK for member in found]
        rows[f"{kind}_size"] = [member.size for member in found]
        rows[f"{kind}_crc"] = [_header_crc(shard, member) for member in found]
    rows["json"] = [sample.json for sample in samples.values()]
    for key in samples:
        keys += os.fsencode(key)
        ends.append(len(keys))
    rows["key_end"] = ends
    return rows, bytes(keys)


def _header_crc(shard: BinaryIO, member: Member) -> int:
    shard.seek(member.header)
    return zlib.crc32(shard.read(BLOCK))


class _Sample(NamedTuple):
    picture: Member
    caption: Member
    json: bool


def _samples(members: Sequence[Member], name: str) -> dict[str, _Sample]:
    """By key."""
    groups: dict[str, dict[str, Member]] = {}
    for member in members:
        if (match := _MEMBER.match(member.name)) is None:
            continue
        kind = match[2].lower()
        kind = "picture" if kind in PICTURE_SUFFIXES else kind
        group = groups.setdefault(match[1], {})
        if kind in group and kind in ("picture", ".txt", ".json"):
            raise ValueError(f"{name}: {match[1]}: two members are its {kind.lstrip('.')}")
        group[kind] = member
    pictures = {key: group for key, group in groups.items() if "picture" in group}
    untold = [key for key, group in pictures.items() if not {".txt", ".json"} & group.keys()]
    if untold:
        raise ValueError(
            f"{name}: {len(untold)} of {len(pictures)} pictures have no caption, first {untold[0]}: "
            "a .txt or a .json of the same name must lie in the shard"
        )
    if not pictures:
        raise ValueError(f"{name}: the shard holds no pictures")
    return {
        key: _Sample(group["picture"], group.get(".txt") or group[".json"], ".txt" not in group)
        for key, group in pictures.items()
    }
