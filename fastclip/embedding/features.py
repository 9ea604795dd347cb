"""Unit vectors of a whole data set, written down as they are computed: whoever stops it goes on where it was."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastclip.data.faults import Tally
from fastclip.data.loading.batches import evaluation_batches
from fastclip.data.picture import limit_in_words
from fastclip.data.source import Source
from fastclip.data.sources.subset import Subset
from fastclip.models.embedder import Embedder
from fastclip.system import env
from fastclip.system.durable import mend_files, remove_folder, write_tensors
from fastclip.system.progress import Progress
from fastclip.system.reading import open_tensors

__all__ = ["PART", "FeatureStore", "ImageFeatures", "image_features", "resumable", "text_features"]

logger = logging.getLogger(__name__)
PART = 4096  # samples of a part of a store, about
_SECONDS = 60.0  # that a part takes at most: on a CPU a large model takes a second a picture
Part = dict[str, Tensor]  # rows of some samples in a row, by what they are


class ImageFeatures(NamedTuple):
    """The vectors of the samples that can be used, in the order of the source."""

    features: Tensor  # (K, D) float32, unit vectors
    labels: Tensor  # (K,) int64, places in the source's `class_names`, -1 without
    indices: Tensor  # (K,) int64, which samples of the source they are


class FeatureStore:
    """A folder of what is computed so far, for one model and one list of inputs; parts appear whole or not at all.

    A part is named after the number of samples before it: several processes, whose parts have other lengths, may fill
    a store at the same time.

    It is a means to go on, no cache: `clear` it when the result is there. What `keys` name is taken to be as it was. Of
    pictures `fastclip.data.identity.picture_states` are such keys: they hold absolute paths, and are others where a
    picture was replaced. A relative path would be the same key in every working directory.

    Args:
        embedder: whose identity the folder is named after.
        keys: all that else the result depends on, such as the pictures' states, in their order. The largest picture
            that is read belongs to them by itself.
        folder: where the store's folder is made; default: FASTCLIP_CACHE.
        owned: no other process writes there, so what is half written is a dead one's.
    """

    def __init__(
        self, embedder: Embedder, keys: Iterable[str], *, folder: Path | None = None, owned: bool = False
    ) -> None:
        digest = hashlib.blake2b(embedder.identity.encode(), digest_size=16)
        for key in (*filter(None, [limit_in_words()]), *keys):
            digest.update(key.encode("utf-8", "surrogatepass") + b"\0")
        self._is_cache, self._lost = folder is None, False
        self.folder = (folder or env.cache_folder() / "features") / digest.hexdigest()
        if owned:
            mend_files(self.folder, owned=True)

    def parts(self) -> list[Part]:
        """Return the parts from the first one on, without a gap; a damaged one ends them."""
        return list(self.walk())

    def walk(self, *names: str) -> Iterator[Part]:
        """Yield `parts`, one at a time; of each the tensors of these names, or all."""
        mend_files(self.folder)
        start = 0
        while (file := self._file(start)).is_file():
            try:
                with open_tensors(file) as opened:
                    if (samples := int(opened.metadata()["samples"])) < 1:
                        raise ValueError("it holds no samples")
                    part = {name: opened.get_tensor(name) for name in names or opened.keys()}
            except (ValueError, OSError, KeyError, TypeError) as error:
                logger.warning("%s is damaged (%s) and computed again", file, error)
                return
            yield part
            start += samples

    def add(self, start: int, part: Part) -> None:
        """Write down the samples from `start` on: "used" or "features" of `part` has a row of each, else it is one.

        Raises:
            OSError: `folder` was given, and its disk is full or cannot be written to; the file is named. Of the cache a
                warning tells it, once.
        """
        if self._lost:
            return
        samples = next((len(part[name]) for name in ("used", "features") if name in part), 1)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_tensors(self._file(start), part, {"samples": str(samples)})
        except FileNotFoundError:  # another process has the whole result, and has cleared the store
            logger.debug("%s is gone", self.folder)
        except OSError as error:
            if not self._is_cache:
                raise
            self._lost = True
            logger.warning("what is computed is not kept (%s), and a stopped command begins anew", error)

    def clear(self) -> None:
        """Remove the store."""
        with suppress(OSError if self._is_cache else FileNotFoundError):  # another process did it
            remove_folder(self.folder)

    def _file(self, start: int) -> Path:
        return self.folder / f"part-{start:06d}.safetensors"


def resumable(stores: list[FeatureStore] | None, embedder: Embedder, keys: Iterable[str]) -> FeatureStore | None:
    """A new store in FASTCLIP_CACHE, put into `stores` too, to be cleared when the result is there; None for None."""
    if stores is None:
        return None
    stores.append(FeatureStore(embedder, keys))
    return stores[-1]


def image_features(
    embedder: Embedder,
    source: Source,
    *,
    batch_size: int = 256,
    workers: int = 0,
    store: FeatureStore | None = None,
    progress: bool = False,
) -> ImageFeatures:
    """Every picture of a source as a unit vector; those that cannot be used are left out, and the log counts them.

    Args:
        batch_size: pictures at a time.
        workers: processes that read pictures; 0 reads in this one.
        store: what it holds is not computed again, and it gets every few thousand pictures that are.
        progress: show how far it is, on stderr.

    Raises:
        ValueError: an empty source or batch, or no picture can be used.
        OSError, ValueError: what the samples are read from cannot be, or 100 tries find no sample that can be used.
    """
    parts = store.parts() if store is not None else []
    size, done = len(source), min(len(source), sum(len(part["used"]) for part in parts))
    if done:
        logger.info("%s: %d of %d pictures are embedded already", source.spec, done, size)
    skipped = Tally()
    batches: Iterator[tuple[Tensor, Tensor, Tensor]] = iter(())
    if done < size or not size:
        rest = Subset(source, range(done, size))
        batches = evaluation_batches(rest, embedder.transform, batch_size=batch_size, workers=workers, skipped=skipped)
    pieces = (
        {"features": embedder.embed_images(images), "labels": labels, "used": places >= 0}
        for images, places, labels in batches
    )
    with Progress(f"pictures of {source.spec}", size, done=done, shown=progress) as bar:
        _extend(parts, pieces, store, bar)
    every = _concatenated(parts)
    used = every["used"]
    if not bool(used.all()):
        bad = int((~used).sum())
        met = f"; met now: {skipped}" if skipped.total else ""
        logger.warning("%s: %d of %d pictures cannot be used and are left out%s", source.spec, bad, size, met)
        if bad == size:
            raise ValueError(f"{source.spec}: none of {size} pictures can be used")
    return ImageFeatures(every["features"][used], every["labels"][used], used.nonzero().flatten())


def text_features(
    embedder: Embedder,
    texts: Sequence[str],
    *,
    batch_size: int = 256,
    store: FeatureStore | None = None,
    progress: bool = False,
) -> Tensor:
    """N texts as unit vectors (N, D), in order; options as `image_features`'."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    parts = store.parts() if store is not None else []
    done = sum(len(part["features"]) for part in parts)
    if done:
        logger.info("%d of %d texts are embedded already", done, len(texts))
    step = min(batch_size, PART)
    chunks = (texts[start : start + step] for start in range(done, len(texts), step))
    pieces = ({"features": embedder.embed_texts(chunk, batch_size=batch_size)} for chunk in chunks)
    with Progress("texts", len(texts), done=done, unit="text", shown=progress) as bar:
        _extend(parts, pieces, store, bar)
    return torch.cat([part["features"] for part in parts]) if parts else embedder.embed_texts([])


def _extend(parts: list[Part], pieces: Iterable[Part], store: FeatureStore | None, bar: Progress) -> None:
    """Join pieces to parts of `PART` samples, or of what a minute suffices for, and add each to `parts` and `store`."""
    start = sum(len(part["features"]) for part in parts)
    for part in _joined(pieces, bar):
        if store is not None:
            store.add(start, part)
        parts.append(part)
        start += len(part["features"])


def _joined(pieces: Iterable[Part], bar: Progress) -> Iterator[Part]:
    waiting, samples, begun = list[Part](), 0, time.monotonic()
    for piece in pieces:
        waiting.append(piece)
        samples += len(piece["features"])
        bar.moved(len(piece["features"]))
        if samples >= PART or time.monotonic() - begun > _SECONDS:
            yield _concatenated(waiting)
            waiting, samples, begun = [], 0, time.monotonic()
    if waiting:
        yield _concatenated(waiting)


def _concatenated(parts: list[Part]) -> Part:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
