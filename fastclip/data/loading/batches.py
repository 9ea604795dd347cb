"""Samples of a source as batches, read ahead by worker processes; the same numbers however many there are."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset, default_collate

from fastclip.data.batch import Batch
from fastclip.data.faults import BadSample, Fault, Tally
from fastclip.data.loading.order import Draw, Order, mix
from fastclip.data.loading.watchdog import Watch
from fastclip.data.loading.workers import load, unshared
from fastclip.data.source import Record, Source

__all__ = ["PairBatch", "evaluation_batches", "pair_batches", "training_batches"]

Transform = Callable[[Image.Image], Tensor]  # -> (3, H, W) float32
Tokenize = Callable[[list[str]], Tensor]  # B texts -> (B, L) int64

_TRIES = 100  # samples that are tried in a row where one cannot be used


def training_batches(
    source: Source,
    transform: Transform,
    tokenize: Tokenize,
    *,
    batch_size: int,
    micro_batch: int | None = None,
    seed: int = 0,
    first_step: int = 0,
    last_step: int,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
    min_side: int | None = None,
    patience: float = 60.0,
) -> Iterator[list[Batch]]:
    """This rank's micro-batches of every step from `first_step` to `last_step` - 1.

    The samples of a step are `Order`'s. Which caption a sample has, and what a random `transform` does with its
    picture, are functions of the seed, the epoch and the sample alone: the ranks' batches together are bit by bit the
    same for any number of ranks and workers and any `micro_batch`, and a run that goes on at `first_step` gets what it
    would have got. The caller's random numbers (torch, numpy, random) are left as they were.

    In place of a sample that cannot be used there is another one, which is a function of the same three: batches keep
    their sizes, and `Batch.skipped` says what is wrong with the sample that was drawn.

    A label is the sample's class, or a hash of its first caption where there are no classes: equal captions, and
    repeats of a sample, belong together.

    Args:
        transform: PIL image of any mode -> (3, H, W) float32; may draw from the global generators of torch's CPU, of
            numpy and of random.
        tokenize: called once a micro-batch.
        batch_size: samples of a step over all ranks, at least `ranks`. Rank r has the rows from r batch_size // ranks
            to (r + 1) batch_size // ranks - 1.
        micro_batch: samples of a `Batch`, the last of a step may have fewer; default: all of the rank.
        workers: processes that read ahead, up to about one step; they live as long as the iterator. With 0 the caller
            reads.
        pin_memory: put the tensors into memory from which a GPU copies fast.
        min_side: what `transform` makes of a picture's shorter side, in pixels: a JPEG of at least twice that may be
            decoded at a fraction of its size. None decodes whole pictures.
        patience: seconds without a batch after which the log names the workers that read, and what.

    Raises:
        ValueError: a number is out of range; or, while iterating, 100 tries find no sample that can be used.
        OSError, ValueError: while iterating, what the samples are read from cannot be, such as a shard; it is named.
        ChildProcessError: while iterating, a worker was killed.
    """
    _check(rank=rank, ranks=ranks, workers=workers)
    if not 0 <= first_step <= last_step:
        raise ValueError(f"steps must run from 0 up, got first_step {first_step} and last_step {last_step}")
    rows = _micro_batch_rows(batch_size, micro_batch, rank, ranks)
    order = Order(len(source), batch_size, seed)
    pieces = (order.draws(step, *piece) for step in range(first_step, last_step) for piece in rows)
    watch = Watch(source, workers, patience)
    samples = _Training(watch, transform, tokenize, seed, min_side)
    loaded = load(samples, pieces, watch, ready=len(rows), pin_memory=pin_memory)
    return ([_unshared(next(loaded)) for _ in rows] for _ in range(first_step, last_step))


def _micro_batch_rows(batch_size: int, micro_batch: int | None, rank: int, ranks: int) -> list[tuple[int, int]]:
    """Return each of this rank's micro-batches as its first row in a step's batch and the row after its last."""
    if batch_size < ranks:
        raise ValueError(f"batch_size must be at least the {ranks} ranks, got {batch_size}")
    start, stop = rank * batch_size // ranks, (rank + 1) * batch_size // ranks
    size = stop - start if micro_batch is None else micro_batch
    if size < 1:
        raise ValueError(f"micro_batch must be positive, got {micro_batch}")
    return [(a, min(a + size, stop)) for a in range(start, stop, size)]


def evaluation_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
    skipped: Tally | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every sample once over the ranks: images (B, 3, H, W), their indices (B,) int64 and labels (B,) int64.

    Rank r takes the indices r, r + ranks, ... in this order. Every rank yields the same number of batches, of the same
    sizes, so that collectives stay in step: where its samples are fewer, sample 0 is added with index -1. Labels are
    -1 where there are no classes. Raises as `training_batches`, and BadSample for a sample that cannot be used.

    Args:
        skipped: counts such samples; there is then another one in its place, with index -1 and label -1.
    """
    _check(rank=rank, ranks=ranks, workers=workers)
    _check_whole(source, batch_size)
    indices = list(range(rank, len(source), ranks))
    indices += [-1] * (len(range(0, len(source), ranks)) - len(indices))  # rank 0 has as many as any
    watch = Watch(source, workers)
    samples = _Evaluation(watch, transform, strict=skipped is None)
    loaded = load(samples, BatchSampler(indices, batch_size, drop_last=False), watch)

    def counted(images: Tensor, indices: Tensor, labels: Tensor, faults: list[Fault]) -> tuple[Tensor, Tensor, Tensor]:
        if skipped is not None:
            skipped.add(faults)
        return unshared(images), unshared(indices), unshared(labels)

    return (counted(*batch) for batch in loaded)


class PairBatch(NamedTuple):
    """Samples in a row, and of the B among them that can be used picture and captions."""

    images: Tensor | None  # (B, 3, H, W) float32; None where B is 0
    captions: list[tuple[str, ...]]  # B
    used: list[bool]  # of all samples
    faults: list[Fault]  # of the others


def pair_batches(source: Source, transform: Transform, *, batch_size: int, workers: int = 0) -> Iterator[PairBatch]:
    """Every sample once, in order, `batch_size` at a time. Raises as `training_batches`."""
    _check(rank=0, ranks=1, workers=workers)
    _check_whole(source, batch_size)
    watch = Watch(source, workers)
    pieces = BatchSampler(range(len(source)), batch_size, drop_last=False)
    loaded = load(_Pairs(watch, transform), pieces, watch)
    return (batch._replace(images=None if batch.images is None else unshared(batch.images)) for batch in loaded)


class _Training(Dataset[Batch]):
    def __init__(self, watch: Watch, transform: Transform, tokenize: Tokenize, seed: int, min_side: int | None) -> None:
        self._watch, self._transform, self._tokenize = watch, transform, tokenize
        self._seed, self._min_side = seed, min_side

    def __getitem__(self, draws: Sequence[Draw]) -> Batch:
        images, captions, labels, keys, skipped = [], [], [], [], []
        for draw in draws:
            candidates = self._candidates(draw)
            record, image, seed, faults = _usable(
                self._watch, self._transform, candidates, epoch=draw.epoch, min_side=self._min_side
            )
            images.append(image)
            captions.append(record.captions[mix(seed, 1) % len(record.captions)])  # not one of the transform's numbers
            labels.append(_text_label(record.captions[0]) if record.label is None else record.label)
            keys.append(record.key)
            skipped += faults[:1]  # those that were tried in its place are counted in their own turn
        ids = self._tokenize(captions)
        # a stack that a worker makes in the memory it shares, else it would be copied there
        return Batch(default_collate(images), ids, torch.tensor(labels), tuple(keys), tuple(skipped))

    def _candidates(self, draw: Draw) -> Iterator[tuple[int, int]]:
        """Yield the sample that was drawn, then others at random, each with the seed of its caption and transform."""
        yield draw.sample, mix(self._seed, draw.epoch, draw.sample)
        for attempt in range(1, _TRIES):
            seed = mix(self._seed, draw.epoch, draw.sample, attempt)
            yield mix(seed, 2) % len(self._watch.source), seed


class _Evaluation(Dataset[tuple[Tensor, Tensor, Tensor, tuple[Fault, ...]]]):
    def __init__(self, watch: Watch, transform: Transform, *, strict: bool) -> None:
        self._watch, self._transform, self._strict = watch, transform, strict

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, tuple[Fault, ...]]:
        images, used, labels, skipped = [], [], [], []
        for index in indices:
            record, image, _, faults = _usable(self._watch, self._transform, self._candidates(max(index, 0)))
            images.append(image)
            used.append(-1 if faults else index)
            labels.append(-1 if record.label is None or used[-1] < 0 else record.label)
            if index >= 0 and faults:
                skipped.append(faults[0])
        return default_collate(images), torch.tensor(used), torch.tensor(labels), tuple(skipped)

    def _candidates(self, index: int) -> Iterator[tuple[int, int]]:
        for attempt in range(1 if self._strict else _TRIES):
            sample = mix(index, attempt) % len(self._watch.source) if attempt else index
            yield sample, mix(sample)


class _Pairs(Dataset[PairBatch]):
    def __init__(self, watch: Watch, transform: Transform) -> None:
        self._watch, self._transform = watch, transform

    def __getitem__(self, indices: Sequence[int]) -> PairBatch:
        images, captions, used, faults = [], [], [], []
        for index in indices:
            try:
                record, image, *_ = _usable(self._watch, self._transform, [(index, mix(index))])
            except BadSample as bad:
                faults.append(bad.fault)
                used.append(False)
                continue
            images.append(image)
            captions.append(record.captions)
            used.append(True)
        return PairBatch(default_collate(images) if images else None, captions, used, faults)


def _usable(
    watch: Watch,
    transform: Transform,
    candidates: Iterable[tuple[int, int]],
    *,
    epoch: int = 0,
    min_side: int | None = None,
) -> tuple[Record, Tensor, int, list[Fault]]:
    """Return the first sample that can be used, its picture transformed, its seed, and the faults before it."""
    faults: list[Fault] = []
    for sample, seed in candidates:
        try:
            record = watch.read(sample, epoch=epoch, min_side=min_side)
            return record, _transformed(transform, record, seed), seed, faults
        except BadSample as bad:
            faults.append(bad.fault)
    if len(faults) == 1:
        raise BadSample(*faults[0])
    tried = list(dict.fromkeys(faults))  # a small source has fewer samples than there are tries
    what = f"{len(faults)} tries found no sample that can be used; tried were"
    raise ValueError(f"{watch.source.spec}: {what} {len(tried)}: {Tally(tried)}")


def _transformed(transform: Transform, record: Record, seed: int) -> Tensor:
    # torch.manual_seed would seed the GPUs too, from which the caller's dropout draws
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        return transform(record.image)
    except MemoryError:  # the machine's fault, not the sample's
        raise
    except Exception as error:
        what = f"the transform failed: {type(error).__name__}: {error}"
        raise BadSample("failed transform", record.key, what) from error


def _text_label(text: str) -> int:
    """Return 63 bits that differ if texts do, the same on every machine; Python's `hash` differs in each process."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # labels are int64 and not negative


def _unshared(batch: Batch) -> Batch:
    images, ids, labels = map(unshared, batch[:3])
    # pinning may make lists of tuples
    return Batch(images, ids, labels, tuple(batch.keys), tuple(Fault(*fault) for fault in batch.skipped))


def _check(*, rank: int, ranks: int, workers: int) -> None:
    if not 0 <= rank < ranks:
        raise ValueError(f"rank must be from 0 to ranks - 1, got rank {rank} of {ranks}")
    if workers < 0:
        raise ValueError(f"workers must not be negative, got {workers}")


def _check_whole(source: Source, batch_size: int) -> None:
    if batch_size < 1 or not len(source):
        raise ValueError(f"batch_size must be positive and data not empty, got {batch_size} of {len(source)} samples")
