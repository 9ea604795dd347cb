"""Embed the images and captions of a dataset part by part, so that an interrupted call can be resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip.data.faults import BadSample, Fault, Tally
from fastclip.data.identity import picture_states
from fastclip.data.loading.batches import PairBatch, pair_batches
from fastclip.data.picture import limit_in_words
from fastclip.data.source import Source
from fastclip.data.sources.subset import Subset
from fastclip.data.spec import absolute_spec
from fastclip.embedding.features import PART, FeatureStore
from fastclip.models.embedder import Embedder
from fastclip.system.progress import Progress
from fastclip.system.reading import parse_json

__all__ = ["Pairs", "call_options", "contents_of", "embed_pairs", "faults_of", "utf8"]


class Pairs(NamedTuple):
    """Vectors and captions of the K usable samples in a contiguous range."""

    images: Tensor  # (K, D) float32, unit vectors
    captions: list[tuple[str, ...]]  # K tuples, each with the captions of one sample
    texts: Tensor  # (T, D) float32, unit vectors of all captions in order


def embed_pairs(
    embedder: Embedder,
    source: Source,
    store: FeatureStore,
    keep: Callable[[Pairs], dict[str, Tensor]],
    *,
    first_caption: bool = False,
    finite: bool = False,
    batch_size: int = 256,
    workers: int = 0,
    progress: bool = False,
) -> None:
    """Embed all samples of a source and store what `keep` derives from them.

    For n samples, a part of the store contains the tensors that `keep` returns and two more: "used", (n,) bool, is True
    for usable samples, and "faults" states why the other samples are unusable. Parts consist of whole batches, so that
    a resumed call gives the same bits as an uninterrupted one.

    Args:
        embedder: model to embed images and captions with.
        source: dataset to read the samples from.
        store: store to fill; its existing parts are reused.
        keep: function from the pairs of a part to the tensors to store.
        first_caption: use only the first caption of each sample.
        finite: leave out samples whose vectors are not finite. Samples must have at most one text vector each, so this
            requires `first_caption`, unless the source has no captions at all.
        batch_size, workers, progress: as in `fastclip.embedding.features.image_features`.

    Raises:
        ValueError: the source is empty, `batch_size` is below 1, or the source is damaged.
        OSError: a file of the source cannot be read, or the store cannot be written.
        ChildProcessError: a worker process was killed.
    """
    if not len(source):
        raise ValueError(f"{source.spec} is empty")
    reading: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "progress": progress}
    reading |= {"first_caption": first_caption, "finite": finite}
    done = -1
    while (stored := sum(len(part["used"]) for part in store.walk("used"))) < len(source):
        if stored <= done:  # another process that fills the same store may replace parts, but never removes any
            raise OSError(f"{store.folder} has lost parts that were written: run the command again")
        done = stored
        _fill(embedder, source, store, keep, done, **reading)


def _fill(
    embedder: Embedder,
    source: Source,
    store: FeatureStore,
    keep: Callable[[Pairs], dict[str, Tensor]],
    start: int,
    *,
    first_caption: bool,
    finite: bool,
    batch_size: int,
    workers: int,
    progress: bool,
) -> None:
    """Embed the samples from number `start` on and add them to the store."""
    done, size = start, len(source)
    rest = Subset(source, range(done, size))
    batches = pair_batches(rest, embedder.pixel_transform, batch_size=batch_size, workers=workers)
    waiting, used, faults = list[Pairs](), list[bool](), Tally()
    with Progress(f"images of {source.spec}", size, done=done, shown=progress) as bar:
        for batch in batches:
            pairs = _embedded(embedder, batch, first_caption, batch_size)
            if finite:
                pairs, batch = _finite(pairs, batch, [source.key(done + k) for k in range(len(batch.used))])
            waiting.append(pairs)
            used += batch.used
            faults.add(batch.faults)
            bar.moved(len(batch.used))
            done += len(batch.used)
            if len(used) >= PART or done == size:  # no time limit: the parts must not depend on the machine's speed
                data = bytearray(json.dumps([faults.counts, faults.keys]).encode())
                part = {"used": torch.tensor(used), "faults": torch.frombuffer(data, dtype=torch.uint8)}
                store.add(start, part | keep(_joined(waiting)))
                start, waiting, used, faults = done, [], [], Tally()


def call_options(embedder: Embedder, source: Source) -> dict[str, Any]:
    """Return the options by which an output folder records its dataset and model (`fastclip.system.claim.claim`)."""
    return {"source": absolute_spec(source.spec), "samples": len(source), "identity": embedder.identity}


def contents_of(source: Source) -> str:
    """Return a digest of the inputs that vectors depend on, apart from the model.

    The digest covers the captions of every sample, the state of its image file (`picture_states`, which gives the same
    absolute path for all spellings of a path), and the maximum number of pixels per image. Images are not read.
    """
    digest = hashlib.blake2b(limit_in_words().encode(), digest_size=16)
    for index, state in enumerate(picture_states(source)):
        try:
            captions = source.captions(index)
        except BadSample:
            captions = ()
        digest.update(json.dumps((state, *captions)).encode() + b"\n")
    return digest.hexdigest()


def faults_of(store: FeatureStore) -> Tally:
    """Return the causes of all unusable samples of a store, with their counts."""
    faults = Tally()
    for part in store.walk("faults"):
        try:
            counts, keys = parse_json(part["faults"].numpy().tobytes(), "a part's list of faults", list)
            tally = Tally.of(counts, keys)
        except ValueError as error:
            raise ValueError(
                f"{store.folder} contains a part that this command did not write ({error}): remove the folder, and run "
                "the command again to compute the results anew"
            ) from error
        faults.merge(tally.counts, tally.keys)
    return faults


def utf8(text: str) -> str:
    """Escape lone surrogates, which may occur in file names but cannot be stored in Parquet."""
    return text.encode("utf-8", "backslashreplace").decode()


def _embedded(embedder: Embedder, batch: PairBatch, first_caption: bool, batch_size: int) -> Pairs:
    if batch.images is None:
        nothing = torch.empty(0, embedder.dim)
        return Pairs(nothing, [], nothing)
    captions = [texts[:1] for texts in batch.captions] if first_caption else batch.captions
    texts = [text for several in captions for text in several]
    vectors = embedder.embed_images(embedder.normalized(batch.images))
    return Pairs(vectors, captions, embedder.embed_texts(texts, batch_size=batch_size))


def _finite(pairs: Pairs, batch: PairBatch, keys: list[str]) -> tuple[Pairs, PairBatch]:
    """Remove the samples with a vector that is not finite, and count them as faults."""
    whole = pairs.images.isfinite().all(1)
    if len(pairs.texts):
        whole &= pairs.texts.isfinite().all(1)
    if bool(whole.all()):
        return pairs, batch
    still = torch.tensor(batch.used)
    still[still.nonzero().flatten()] = whole
    used = still.tolist()
    bad = [key for key, was, now in zip(keys, batch.used, used) if was and not now]
    faults = [Fault("vector is not finite", key, "the model returns NaN or infinity for this sample") for key in bad]
    captions = [texts for texts, kept in zip(pairs.captions, whole.tolist()) if kept]
    left = Pairs(pairs.images[whole], captions, pairs.texts[whole] if len(pairs.texts) else pairs.texts)
    return left, batch._replace(used=used, faults=[*batch.faults, *faults])


def _joined(several: list[Pairs]) -> Pairs:
    captions = [texts for pairs in several for texts in pairs.captions]
    return Pairs(torch.cat([p.images for p in several]), captions, torch.cat([p.texts for p in several]))
