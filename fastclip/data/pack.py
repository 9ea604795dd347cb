"""Write images and captions as tar shards in img2dataset's layout."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tarfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import BatchSampler, Dataset

from fastclip.data.faults import BadSample, Fault, Tally
from fastclip.data.loading.watchdog import Watch
from fastclip.data.loading.workers import load, naming_dead_workers
from fastclip.data.picture import older_limit, picture_formats
from fastclip.data.pillow_warnings import quietly
from fastclip.data.source import Record, Source, picture_bytes, sample_fields, sample_stamp
from fastclip.data.spec import absolute_spec
from fastclip.system.durable import new_file, write_json
from fastclip.system.owner import owning
from fastclip.system.reading import read_json

__all__ = ["Packed", "pack_source"]

logger = logging.getLogger(__name__)

_PIECE = 16  # samples that a worker reads at a time
_KEPT = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}  # formats whose files are copied unchanged


class Packed(NamedTuple):
    """The counts of shards and samples that `pack_source` has written."""

    shards: int  # shards that hold samples
    samples: int
    faults: Tally
    kept: int  # shards that an earlier call had finished


@owning
def pack_source(
    source: Source,
    output: Path,
    *,
    samples_per_shard: int = 10_000,
    image_size: int | None = None,
    quality: int = 95,
    workers: int = 0,
) -> Packed:
    """Write the samples of `source` to shards ``00000.tar`` ..., each as an image, a .json and usually a .txt.

    The .txt holds the caption of a sample with a single caption. JPEG, PNG and WebP files are copied byte by byte, and
    other images are written as PNG. The .json holds:

    - "caption", a string, or a list if there are several. With several captions no .txt is written, because readers
      would take it for the only caption.
    - "key", "width" and "height" of the upright image, "original" (the sample's key in the source), and "label" (if the
      sample has one).
    - the other fields that `sample_fields` returns. Reading the shards therefore gives the same samples as the source.

    Shards of a mixture hold the samples of its first epoch. Samples that cannot be used are left out, and
    ``00000_stats.json`` counts them by cause.

    A shard appears under its name only when it is complete. Repeat the same call to resume an interrupted one; the
    result is byte-identical. Shards are written again if the captions of their samples, or the paths, sizes or times
    of their files, have changed.

    Args:
        samples_per_shard: samples of the source per shard, including those that cannot be used.
        image_size: the largest length of an image's shorter side, in pixels. Larger images are scaled down to this
            length and written as JPEG. None keeps all images as they are.
        quality: JPEG quality of the resized images, 1 to 95.
        workers: number of processes that read.

    Raises:
        ValueError: an option is out of range, `output` holds shards of another source or with other options, or no
            sample can be used.
        OSError: a file cannot be read or written, or another process owns the folder (`fastclip.system.owner`).
        ChildProcessError: a worker was killed.
    """
    if samples_per_shard < 1 or (image_size is not None and image_size < 1) or not 1 <= quality <= 95 or workers < 0:
        raise ValueError(
            "samples_per_shard and image_size must be at least 1, quality from 1 to 95 and workers at least 0, got "
            f"{samples_per_shard}, {image_size}, {quality} and {workers}"
        )
    about = {"source": absolute_spec(source.spec), "samples": len(source), "samples_per_shard": samples_per_shard}
    about |= {"image_size": image_size, "quality": quality if image_size else None}
    about |= {"max_pixels": Image.MAX_IMAGE_PIXELS}
    samples, shards, kept, faults = 0, 0, 0, Tally()
    watch = Watch(source, workers)
    for shard, start in enumerate(range(0, len(source), samples_per_shard)):
        indices = range(start, min(start + samples_per_shard, len(source)))
        content = _content(source, indices)
        stats = _finished(output, shard, about, content)
        if stats is None:
            with naming_dead_workers():
                pieces = BatchSampler(indices, _PIECE, drop_last=False)
                results = chain.from_iterable(load(_Encoded(watch, image_size, quality), pieces, watch))
                digits = len(str(samples_per_shard - 1))
                stats = _write(output, shard, digits, results, about | {"content": content})
            logger.info("%s: shard %05d, %d of %d samples", output, shard, indices.stop, len(source))
        else:
            kept += 1
        faults.merge(stats["failures"], stats["failed"])
        samples += stats["successes"]
        shards += 1 if stats["successes"] else 0
    if not samples:
        raise ValueError(f"{source.spec}: none of {len(source)} samples can be used: {faults}")
    return Packed(shards, samples, faults, kept)


class _Sample(NamedTuple):
    suffix: str
    data: bytes  # content of the image file
    captions: tuple[str, ...]
    about: dict[str, Any]


class _Encoded(Dataset[list[Any]]):
    def __init__(self, watch: Watch, image_size: int | None, quality: int) -> None:
        self._watch, self._image_size, self._quality = watch, image_size, quality

    def __getitem__(self, indices: Sequence[int]) -> list[_Sample | Fault]:
        return [self._sample(index) for index in indices]

    def _sample(self, index: int) -> _Sample | Fault:
        try:
            record = self._watch.read(index)
            suffix, data, size = self._file(index, record)
        except BadSample as bad:
            return bad.fault
        about = {k: v for k, v in sample_fields(self._watch.source, index).items() if k not in ("caption", "key")}
        about |= {"width": size[0], "height": size[1], "original": record.key}
        if record.label is not None:
            about["label"] = record.label
        return _Sample(suffix, data, record.captions, about)

    def _file(self, index: int, record: Record) -> tuple[str, bytes, tuple[int, int]]:
        image, file = record.image, io.BytesIO()
        if self._image_size is not None and min(image.size) > self._image_size:
            ratio = self._image_size / min(image.size)
            size = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
            image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=self._quality)
            return ".jpg", file.getvalue(), size
        if (data := picture_bytes(self._watch.source, index)) is not None:
            with quietly(), Image.open(io.BytesIO(data), formats=picture_formats()) as original:
                if original.format in _KEPT:
                    return _KEPT[original.format], data, image.size
        colours = image if image.mode in ("1", "L", "LA", "RGB", "RGBA") else image.convert("RGB")
        if image.mode == "LAB":
            colours.info.pop("icc_profile", None)  # Pillow's profile holds the time of day, which changes the bytes
        colours.save(file, "PNG")
        return ".png", file.getvalue(), image.size


def _write(
    output: Path, shard: int, digits: int, results: Iterable[_Sample | Fault], about: dict[str, Any]
) -> dict[str, Any]:
    """Write one shard and its stats file, and return the stats."""
    target, faults, written = output / f"{shard:05d}.tar", Tally(), 0
    target.unlink(missing_ok=True)  # an older shard must not be taken for the one that the new stats describe
    with suppress(_Nothing), new_file(target) as half:
        with half.open("wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
            for number, result in enumerate(results):
                if isinstance(result, Fault):
                    faults.add([result])
                else:
                    _add(tar, f"{shard:05d}{number:0{digits}d}", result)
                    written += 1
        stats = {**about, "shard": shard, "count": written + faults.total, "successes": written}
        stats |= {"bytes": half.stat().st_size, "failures": faults.counts, "failed": faults.keys}
        # The stats come first, because a shard without stats is assumed to be written by another program.
        write_json(output / f"{shard:05d}_stats.json", stats, indent=1)
        if not written:
            raise _Nothing
    return stats


class _Nothing(Exception):
    """Raised to discard a shard without samples: reading an empty shard is an error, which would end a training run."""


def _content(source: Source, indices: Sequence[int]) -> str:
    """Return a digest that changes when one of these samples changes."""
    digest = hashlib.blake2b(digest_size=16)
    for index in indices:
        digest.update(sample_stamp(source, index).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def _add(tar: tarfile.TarFile, key: str, sample: _Sample) -> None:
    first, rest = sample.captions[0], sample.captions[1:]
    about = {"caption": list(sample.captions) if rest else first, "key": key, **sample.about}
    try:
        text = json.dumps(about, allow_nan=False)
    except ValueError:  # JSON has no NaN and no infinities: they become null
        text = json.dumps(json.loads(json.dumps(about), parse_constant=lambda name: None))
    members = {sample.suffix: sample.data, ".json": text.encode()}
    if not rest:  # readers that find a .txt ignore the captions in the .json
        members[".txt"] = first.encode()
    for suffix, data in members.items():
        info = tarfile.TarInfo(key + suffix)  # without times or owners, so that the same samples give the same bytes
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def _finished(output: Path, shard: int, about: dict[str, Any], content: str) -> dict[str, Any] | None:
    """Return the stats of a shard that is complete and holds these samples, or None if it has to be written."""
    name, tar = output / f"{shard:05d}_stats.json", output / f"{shard:05d}.tar"
    if not name.is_file():
        if tar.exists():
            raise ValueError(f"{tar} was not written by this command: choose another folder")
        return None
    stats: dict[str, Any] = read_json(name)
    known = older_limit(stats)
    try:
        stats["successes"] = int(stats["successes"])
        faults = Tally.of(stats["failures"], stats["failed"])
        stats |= {"failures": faults.counts, "failed": faults.keys}
        whole = not stats["successes"] or (tar.is_file() and tar.stat().st_size == stats["bytes"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name} was not written by this command ({error}): choose another folder") from error
    same = stats.get("content") == content
    if changed := [key for key in about if key not in known or known[key] != about[key]]:
        if "content" not in stats or not known.keys() >= about.keys():
            raise ValueError(f"{output} was created by another version of fastclip: choose another folder")
        changes = ", ".join(f"{key} was {known[key]}, is now {about[key]}" for key in changed)
        raise ValueError(f"{output} was begun with other options ({changes}): choose another folder")
    if not same:
        logger.warning("%s: the shard is written again, because its samples have changed", tar)
    return stats if whole and same else None
