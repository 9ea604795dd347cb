"""Compute the unit vectors of a whole dataset, storing them on the way so that an interrupted call can be resumed."""

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
PART = 4096  # approximate number of samples per part of a store
_SECONDS = 60.0  # maximum time per part: on a CPU, a large model may take a second per image
Part = dict[str, Tensor]  # tensors by name, each with one row per sample of a contiguous range


class ImageFeatures(NamedTuple):
    """Vectors of the K usable samples of a source, in the order of the source."""

    features: Tensor  # (K, D) float32, unit vectors
    labels: Tensor  # (K,) int64, indices into the source's `class_names`; -1 for samples without a class
    indices: Tensor  # (K,) int64, indices of the samples in the source


class FeatureStore:
    """Folder with the results computed so far for one model and one list of inputs.

    The results are stored in parts, and each part appears either completely or not at all. A part is named after the
    number of samples before it, so that several processes with parts of different lengths may fill a store at the same
    time.

    A store exists only so that an interrupted computation can be resumed, and is not kept for other calls. Call `clear`
    once the result is written.

    The folder's name depends on the embedder and on `keys`, and inputs with equal keys are assumed to be unchanged. For
    images, use `fastclip.data.identity.picture_states`. Its texts contain absolute paths, and change when a file is
    replaced. A relative path would give the same key in every working directory.

    Args:
        embedder: embedder that computes the vectors, represented by its identity.
        keys: everything else that the result depends on, such as the states of the images, in order. The maximum
            number of pixels per image (Pillow's `MAX_IMAGE_PIXELS`) is added if it differs from Pillow's default.
        folder: folder in which the store's folder is created (default: ``features`` in FASTCLIP_CACHE).
        owned: declare that no other process writes to the store, so that half-written files can be removed at once.
    """

    def __init__(
        self, embedder: Embedder, keys: Iterable[str], *, folder: Path | None = None, owned: bool = False
    ) -> None:
        digest = hashlib.blake2b(embedder.identity.encode(), digest_size=16)
        for key in (*filter(None, [limit_in_words()]), *keys):
            digest.update(key.encode("utf-8", "surrogatepass") + b"\0")  # file names may contain lone surrogates
        self._is_cache, self._lost = folder is None, False
        self.folder = (folder or env.cache_folder() / "features") / digest.hexdigest()
        if owned:
            mend_files(self.folder, owned=True)

    def parts(self) -> list[Part]:
        """Return all parts up to the first gap or damaged part, in order."""
        return list(self.walk())

    def walk(self, *names: str) -> Iterator[Part]:
        """Yield `parts` one at a time, each with only the tensors of the given names (default: all tensors)."""
        mend_files(self.folder)
        start = 0
        while (file := self._file(start)).is_file():
            try:
                with open_tensors(file) as opened:
                    if (samples := int(opened.metadata()["samples"])) < 1:
                        raise ValueError("it contains no samples")
                    part = {name: opened.get_tensor(name) for name in names or opened.keys()}
            except (ValueError, OSError, KeyError, TypeError) as error:
                logger.warning("%s is damaged (%s) and will be computed again", file, error)
                return
            yield part
            start += samples

    def add(self, start: int, part: Part) -> None:
        """Store the part that begins with sample number `start`.

        The number of samples is the number of rows of the tensor "used" or "features"; a part without these
        tensors holds one sample.

        Raises:
            OSError: the store was created with `folder`, and its disk is full or not writable. The message names the
                file. For a store in FASTCLIP_CACHE, a warning is logged once instead.
        """
        if self._lost:
            return
        samples = next((len(part[name]) for name in ("used", "features") if name in part), 1)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_tensors(self._file(start), part, {"samples": str(samples)})
        except FileNotFoundError:  # another process has written the result and cleared the store
            logger.debug("%s was removed by another process: the call continues without it", self.folder)
        except OSError as error:
            if not self._is_cache:
                raise
            self._lost = True
            logger.warning(
                "progress is not saved (%s): if this command is interrupted, the unsaved work must be repeated. Set "
                "FASTCLIP_CACHE to a writable folder with enough space",
                error,
            )

    def clear(self) -> None:
        """Remove the store with all of its parts."""
        with suppress(OSError if self._is_cache else FileNotFoundError):  # another process may have removed it
            remove_folder(self.folder)

    def _file(self, start: int) -> Path:
        return self.folder / f"part-{start:06d}.safetensors"


def resumable(stores: list[FeatureStore] | None, embedder: Embedder, keys: Iterable[str]) -> FeatureStore | None:
    """Create a store in FASTCLIP_CACHE and append it to `stores`, whose owner clears it once the result is written.

    Returns:
        The store, or None if `stores` is None, in which case nothing is stored.
    """
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
    """Embed all images of a source.

    Images that cannot be used are left out, and their number is logged.

    Args:
        embedder: model to embed the images with.
        source: dataset to read the images from.
        batch_size: images per forward pass.
        workers: worker processes that read images (0: read in this process).
        store: store with results of an earlier, interrupted call. Its results are reused, and every few thousand new
            results are added to it.
        progress: show a progress bar on stderr.

    Returns:
        Unit vectors, class labels and indices of the usable images.

    Raises:
        ValueError: the source is empty, `batch_size` is below 1, no image can be used, or an unusable image and 99
            random others, which are tried as its replacement in the batch, are all unusable.
        OSError: a file of the source cannot be read.
    """
    parts = store.parts() if store is not None else []
    size, done = len(source), min(len(source), sum(len(part["used"]) for part in parts))
    if done:
        logger.info("%s: %d of %d images are embedded already", source.spec, done, size)
    skipped = Tally()
    batches: Iterator[tuple[Tensor, Tensor, Tensor]] = iter(())
    if done < size or not size:
        rest = Subset(source, range(done, size))
        batches = evaluation_batches(
            rest, embedder.pixel_transform, batch_size=batch_size, workers=workers, skipped=skipped
        )
    pieces = (
        {"features": embedder.embed_images(embedder.normalized(images)), "labels": labels, "used": places >= 0}
        for images, places, labels in batches
    )
    with Progress(f"images of {source.spec}", size, done=done, shown=progress) as bar:
        _extend(parts, pieces, store, bar)
    every = _concatenated(parts)
    used = every["used"]
    if not bool(used.all()):
        bad = int((~used).sum())
        met = f"; causes in this call: {skipped}" if skipped.total else ""
        logger.warning("%s: %d of %d images cannot be used and are left out%s", source.spec, bad, size, met)
        if bad == size:
            raise ValueError(f"{source.spec}: none of {size} images can be used")
    return ImageFeatures(every["features"][used], every["labels"][used], used.nonzero().flatten())


def text_features(
    embedder: Embedder,
    texts: Sequence[str],
    *,
    batch_size: int = 256,
    store: FeatureStore | None = None,
    progress: bool = False,
) -> Tensor:
    """Embed N texts as unit vectors (N, D), in order.

    Args:
        embedder: model to embed the texts with.
        texts: the texts.
        batch_size: texts per forward pass.
        store: store with results of an earlier, interrupted call, as in `image_features`.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: `batch_size` is below 1.
    """
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
    """Join pieces into parts of `PART` samples or one minute of work, and add each part to `parts` and `store`."""
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
