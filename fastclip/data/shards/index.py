"""Index of a shard: its samples and the places of their members, computed once and stored in a small file.

    00000.tar.fastclip-index    beside the shard, or under another name in `fastclip.system.env.cache_folder()`

The file consists of a `_HEAD`, the rows, the concatenated keys, and a JSON object with the damage of the shard and the
members that belong to no sample. The index is valid as long as the size and the modification time of the shard, and the
headers of a few members, are unchanged. A damaged index, or one of another version, is built again.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import struct
import tarfile
import zlib
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from fastclip.data.faults import Fault, Tally, in_threads
from fastclip.data.files import open_file
from fastclip.data.shards.samples import FAULTS, UNTOLD, WANTED, Sample, shard_samples
from fastclip.data.shards.tar_index import BLOCK, read_exactly, tar_members
from fastclip.system import env
from fastclip.system.durable import mend_files, write_bytes
from fastclip.system.plural import counted
from fastclip.system.reading import parse_json

__all__ = ["ROW", "ShardIndex", "Stamp", "index_of", "index_shards", "stamp_of"]

logger = logging.getLogger(__name__)

# One sample, 53 bytes. For each of its image, .txt, .json and .cls: the number of the header's block (of 512 bytes),
# the size of the data in bytes and the CRC-32 of the header; all three are 0 if the member is missing or cannot be
# used. Then the end of the sample's key in the concatenated keys of the shard, and the sample's state.
_KINDS = ("picture", "text", "json", "number")
_MEMBERS = [(f"{kind}_{what}", "<u4") for kind in _KINDS for what in ("block", "size", "crc")]
ROW = np.dtype([*_MEMBERS, ("key_end", "<u4"), ("state", "u1")])
Rows = npt.NDArray[Any]

# Magic, the shard's size and time, the sizes in bytes of the rows, the keys and the JSON, and the CRC-32 of all three
_HEAD = struct.Struct("<8sqqqqqI")
_MAGIC = b"fcindex5"
_CHECKED = 2  # about how many headers are compared with the shard when an index is loaded
_LARGEST = 2**32 * BLOCK


class Stamp(NamedTuple):
    """The size and modification time of a file, which change when the file is written."""

    size: int
    mtime_ns: int


class ShardIndex(NamedTuple):
    """The samples of one shard in memory."""

    stamp: Stamp
    rows: Rows  # (n,) of `ROW`
    keys: bytes  # concatenated, encoded by `os.fsencode`
    damage: str  # message about a shard that is cut off or damaged, or ""
    passed: Tally  # members that belong to no sample


def stamp_of(stat: os.stat_result) -> Stamp:
    return Stamp(stat.st_size, stat.st_mtime_ns)


def index_shards(
    paths: Sequence[str], names: Sequence[str], problems: list[str] | None = None
) -> list[ShardIndex | None]:
    """Return the index of every shard, in order, read by several threads. The log names the damaged shards.

    Args:
        names: the names by which messages refer to the shards.
        problems: a list that receives the messages about damaged shards in place of the log, and the messages about
            shards that cannot be used at all, for which None is returned. Without a list, a shard that cannot be used
            at all raises an error.

    Raises:
        OSError: a shard cannot be opened.
        ValueError: a shard is not a tar file, or holds no usable sample; the message names it.
    """
    mend_files(env.cache_folder() / "index")
    shards = range(len(paths))
    usable = in_threads(lambda shard: index_of(paths[shard], names[shard]), shards, problems)
    for shard, index in usable.items():
        if index.damage and problems is not None:
            problems.append(f"{names[shard]}: {index.damage}")
        elif index.damage:
            logger.warning("%s: %s", names[shard], index.damage)
    return [usable.get(shard) for shard in shards]


def index_of(path: str, name: str) -> ShardIndex:
    """Return the index of one shard, stored or new. Raises the errors of `index_shards`, and logs no damage."""
    files = Path(f"{path}.fastclip-index"), _cached(path)
    with open_file(path, buffering=0) as shard:
        before = stamp_of(os.fstat(shard.fileno()))
        for file in files:
            if (kept := _load(file, before, shard)) is not None:
                return kept
        index = ShardIndex(before, *_build(shard, name))
        if stamp_of(os.fstat(shard.fileno())) != before:
            raise ValueError(f"{name}: the shard changed while it was indexed: run again when nothing writes to it")
    for file in files:
        try:
            _store(file, index)
            break
        except OSError as error:
            logger.info("%s: the index cannot be stored there: %s", file, error)
    return index


def _cached(path: str) -> Path:
    name = hashlib.blake2b(os.fsencode(os.path.realpath(path)), digest_size=16).hexdigest()
    return env.cache_folder() / "index" / f"{name}.fastclip-index"


def _load(file: Path, stamp: Stamp, shard: BinaryIO) -> ShardIndex | None:
    """Return the index stored in a file; None if it is damaged, or if the shard's stamp or headers have changed."""
    try:
        data = file.read_bytes()
    except OSError:
        return None
    if len(data) < _HEAD.size:
        return None
    magic, size, mtime_ns, rows, keys, notes, checksum = _HEAD.unpack_from(data)
    content = memoryview(data)[_HEAD.size :]
    head = magic, Stamp(size, mtime_ns), rows + keys + notes
    if head != (_MAGIC, stamp, len(content)) or zlib.crc32(content) != checksum:
        return None
    table, rest = np.frombuffer(content[:rows], ROW), bytes(content[rows:])
    usable = table[table["picture_crc"] > 0]
    for row in usable[:: max(1, len(usable) // _CHECKED)]:
        if _header_crc(shard, int(row["picture_block"]) * BLOCK) != row["picture_crc"]:
            return None
    about = parse_json(rest[keys:], str(file))
    return ShardIndex(stamp, table, rest[:keys], about["damage"], Tally.of(about["passed"], about["first"]))


def _store(file: Path, index: ShardIndex) -> None:
    """Store the index in a file, atomically: a reader sees the whole file or none."""
    about = {"damage": index.damage, "passed": index.passed.counts, "first": index.passed.keys}
    parts = index.rows.tobytes(), index.keys, json.dumps(about).encode()
    content = b"".join(parts)
    head = _HEAD.pack(_MAGIC, *index.stamp, *map(len, parts), zlib.crc32(content))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, head + content)


def _build(shard: BinaryIO, name: str) -> tuple[Rows, bytes, str, Tally]:
    """Return the rows, the keys, the damage and the unused members for a `ShardIndex`."""
    try:
        contents = tar_members(shard)
    except tarfile.TarError as error:
        raise ValueError(f"{name}: not a tar file, or one that is cut off: {error}") from error
    end = shard.seek(0, io.SEEK_END)
    if end >= _LARGEST:
        raise ValueError(f"{name}: a shard must be smaller than 2 TiB, but this one has {end:,} bytes: split it")
    samples, passed = shard_samples(contents, end)
    damage = _damage(samples, contents.broken, passed, name)
    rows, keys = np.zeros(len(samples), ROW), [os.fsencode(sample.key) for sample in samples]
    rows["key_end"] = list(accumulate(map(len, keys)))
    rows["state"] = [sample.state for sample in samples]
    for kind in _KINDS:
        places = [(row, member) for row, sample in enumerate(samples) if (member := getattr(sample, kind)) is not None]
        used = [row for row, _ in places]
        rows[f"{kind}_block"][used] = [member.header // BLOCK for _, member in places]
        rows[f"{kind}_size"][used] = [member.size for _, member in places]
        rows[f"{kind}_crc"][used] = [_header_crc(shard, member.header) for _, member in places]
    return rows, b"".join(keys), damage, passed


def _header_crc(shard: BinaryIO, place: int) -> int:
    shard.seek(place)
    return zlib.crc32(read_exactly(shard, BLOCK))


def _damage(samples: Sequence[Sample], broken: str, passed: Tally, name: str) -> str:
    """Return a message about the damage of a shard, or "". Raises ValueError if none of its samples can be used."""
    usable = sum(sample.picture is not None for sample in samples)
    if broken and not usable:
        raise ValueError(f"{name}: not a tar file, or one that is cut off or damaged: {broken}")
    but = passed.also_holds()
    if not samples:
        raise ValueError(f"{name}: the shard holds no images{but}")
    if not usable and all(sample.state == UNTOLD for sample in samples):
        first = f"the first is {samples[0].key}: {WANTED}"
        raise ValueError(f"{name}: none of {len(samples)} images has a caption; {first}{but}")
    if not usable:
        causes = Tally(Fault(FAULTS[sample.state][0], sample.key, "") for sample in samples)
        raise ValueError(f"{name}: none of {len(samples)} samples can be used: {causes}{but}")
    used = f"{counted(usable, 'sample')}, which {'is' if usable == 1 else 'are'} used"
    return f"cut off or damaged after {used}: {broken}" if broken else ""
