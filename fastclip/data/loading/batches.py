"""Read the samples of a source ahead as batches. The batches do not depend on the number of worker processes."""

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
from fastclip.data.sources.mixture import sample_position
from fastclip.system.plural import counted

__all__ = ["PairBatch", "evaluation_batches", "pair_batches", "training_batches"]

Transform = Callable[[Image.Image], Tensor]  # -> (3, H, W), uint8 pixels or float32
Tokenize = Callable[[list[str]], Tensor]  # B texts -> (B, L) int64

_TRIES = 100  # samples to try for one row of a batch before giving up


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
    """Yield this rank's micro-batches of every step from `first_step` to `last_step` - 1, one list per step.

    `Order` decides the samples of a step. The caption that a sample contributes, and the random choices of `transform`,
    depend only on the seed, the epoch and the sample. Taken together, the batches of all ranks are therefore
    bit-identical for any number of ranks and workers and any `micro_batch`, and a run that resumes at `first_step` gets
    the batches that an uninterrupted run would have got. The caller's random states (torch, numpy, random) are
    preserved.

    A sample that cannot be used is replaced by another one, chosen by the same seed, epoch and sample. Batches keep
    their sizes, and `Batch.skipped` holds the fault of the sample that was drawn.

    The label of a sample is its class, or a hash of its first caption if there are no classes. Samples with equal
    first captions, and repetitions of a sample, are therefore positives of each other.

    Args:
        transform: PIL image of any mode -> (3, H, W), uint8 pixels or float32. `Batch.images` has the same dtype. It
            may draw random numbers from the global generators of torch (CPU), numpy and random.
        tokenize: list of B texts -> (B, L) int64, called once per micro-batch.
        batch_size: samples per step over all ranks, at least `ranks`. Rank r has the rows from
            (r * batch_size) // ranks up to, but not including, ((r + 1) * batch_size) // ranks.
        micro_batch: samples per `Batch` (default: all samples of the rank). The last of a step may be smaller.
        workers: number of worker processes. Together they read about one step ahead, and they live as long as the
            iterator. With 0 the calling process reads.
        pin_memory: put the tensors into pinned memory, from which a GPU copies faster.
        min_side: the length in pixels to which `transform` scales an image's shorter side. A JPEG at least twice as
            large may then be decoded at a fraction of its size. None decodes images in full size.
        patience: seconds without a batch after which the log names the workers that are reading, and their samples.

    Raises:
        ValueError: a number is out of range, or, while iterating, none of 100 samples in a row can be used.
        OSError, ValueError: while iterating, a file that holds samples, such as a shard, cannot be read. The message
            names the file.
        ChildProcessError: while iterating, a worker was killed.
    """
    _check(rank=rank, ranks=ranks, workers=workers)
    if not 0 <= first_step <= last_step:
        raise ValueError(
            "first_step must be at least 0 and last_step at least first_step, "
            f"got first_step {first_step} and last_step {last_step}"
        )
    rows = _micro_batch_rows(batch_size, micro_batch, rank, ranks)
    order = Order(len(source), batch_size, seed)
    # The calling process draws the samples, and workers only read them: the order cannot depend on the workers.
    pieces = (order.draws(step, *piece) for step in range(first_step, last_step) for piece in rows)
    watch = Watch(source, workers, patience)
    samples = _Training(watch, transform, tokenize, seed, min_side)
    loaded = load(samples, pieces, watch, ready=len(rows), pin_memory=pin_memory)
    return ([_unshared(next(loaded)) for _ in rows] for _ in range(first_step, last_step))


def _micro_batch_rows(batch_size: int, micro_batch: int | None, rank: int, ranks: int) -> list[tuple[int, int]]:
    """Return this rank's micro-batches, each as a range (start, stop) of the rows of a step's batch."""
    if batch_size < ranks:
        raise ValueError(f"batch_size must be at least the number of ranks ({ranks}), got {batch_size}")
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
    """Yield every sample once over all ranks: images (B, 3, H, W), their indices (B,) int64 and labels (B,) int64.

    The images have the dtype that `transform` returns, uint8 or float32.

    Rank r reads the indices r, r + ranks, ... in this order. Every rank yields the same number of batches of the same
    sizes, because collectives need all ranks: a rank with fewer samples adds sample 0 with index -1. Labels are -1
    without classes. Raises the errors of `training_batches`, and BadSample for a sample that cannot be used.

    Args:
        skipped: a tally that counts the samples that cannot be used, in place of the error. Each of them is replaced by
            another sample with index -1 and label -1.
    """
    _check(rank=rank, ranks=ranks, workers=workers)
    _check_whole(source, batch_size)
    indices = list(range(rank, len(source), ranks))
    indices += [-1] * (len(range(0, len(source), ranks)) - len(indices))  # rank 0 has the most samples
    watch = Watch(source, workers)
    samples = _Evaluation(watch, transform, strict=skipped is None)
    loaded = load(samples, BatchSampler(indices, batch_size, drop_last=False), watch)

    def counted(images: Tensor, indices: Tensor, labels: Tensor, faults: list[Fault]) -> tuple[Tensor, Tensor, Tensor]:
        if skipped is not None:
            skipped.add(faults)
        return unshared(images), unshared(indices), unshared(labels)

    return (counted(*batch) for batch in loaded)


class PairBatch(NamedTuple):
    """Consecutive samples: the images and captions of the B usable ones, and the faults of the rest."""

    images: Tensor | None  # (B, 3, H, W), in the dtype of the transform; None if B is 0
    captions: list[tuple[str, ...]]  # B tuples, each with the captions of a usable sample
    used: list[bool]  # for every sample, True if it is usable
    faults: list[Fault]  # of the samples that are not usable


def pair_batches(source: Source, transform: Transform, *, batch_size: int, workers: int = 0) -> Iterator[PairBatch]:
    """Yield every sample once, in order, `batch_size` at a time. Raises the errors of `training_batches`."""
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
        images, captions, labels, keys, skipped, samples = [], [], [], [], [], []
        for draw in draws:
            candidates = self._candidates(draw)
            sample, record, image, seed, faults = _usable(
                self._watch, self._transform, candidates, epoch=draw.epoch, min_side=self._min_side
            )
            images.append(image)
            # mix(seed, 1) is independent of the numbers that the transform draws from a generator seeded with `seed`.
            captions.append(record.captions[mix(seed, 1) % len(record.captions)])
            labels.append(_text_label(record.captions[0]) if record.label is None else record.label)
            keys.append(record.key)
            samples.append(sample_position(self._watch.source, sample, draw.epoch))
            # The other faults are those of replacements. Each is counted in the batch for which its sample is drawn.
            skipped += faults[:1]
        ids = self._tokenize(captions)
        # In a worker default_collate stacks directly into shared memory; torch.stack would need another copy.
        label, sample_of = torch.tensor(labels), torch.tensor(samples)
        return Batch(default_collate(images), ids, label, tuple(keys), tuple(skipped), sample_of)

    def _candidates(self, draw: Draw) -> Iterator[tuple[int, int]]:
        """Yield the sample that was drawn, then random replacements, each with a seed for its caption and transform.

        The seeds are functions of the run's seed, the epoch and the sample, so that resumed runs and other numbers of
        ranks replace an unusable sample by the same one.
        """
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
            _, record, image, _, faults = _usable(self._watch, self._transform, self._candidates(max(index, 0)))
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
                _, record, image, *_ = _usable(self._watch, self._transform, [(index, mix(index))])
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
) -> tuple[int, Record, Tensor, int, list[Fault]]:
    """Return the first usable candidate's index, record, transformed image and seed, and the faults of earlier ones."""
    faults: list[Fault] = []
    for sample, seed in candidates:
        try:
            record = watch.read(sample, epoch=epoch, min_side=min_side)
            return sample, record, _transformed(transform, record, seed), seed, faults
        except BadSample as bad:
            faults.append(bad.fault)
    if len(faults) == 1:
        raise BadSample(*faults[0])
    tried = list(dict.fromkeys(faults))  # a small source has fewer samples than there are tries
    what = f"{len(faults)} tries found no usable sample among {counted(len(tried), 'different sample')}"
    raise ValueError(f"{watch.source.spec}: {what} (see `fastclip data check`): {Tally(tried)}")


def _transformed(transform: Transform, record: Record, seed: int) -> Tensor:
    # torch.manual_seed would seed the GPUs' generators too, which the caller's dropout uses.
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
    """Return a 63-bit hash of the text. Unlike Python's `hash` it is the same in every process and on every machine."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # labels are int64 and not negative


def _unshared(batch: Batch) -> Batch:
    images, ids, labels = map(unshared, batch[:3])
    # DataLoader's pinning may have turned the tuples into lists.
    skipped = tuple(Fault(*fault) for fault in batch.skipped)
    return Batch(images, ids, labels, tuple(batch.keys), skipped, unshared(batch.samples))


def _check(*, rank: int, ranks: int, workers: int) -> None:
    if not 0 <= rank < ranks:
        raise ValueError(f"rank must be from 0 to ranks - 1, got rank {rank} of {ranks}")
    if workers < 0:
        raise ValueError(f"workers must not be negative, got {workers}")


def _check_whole(source: Source, batch_size: int) -> None:
    if batch_size < 1 or not len(source):
        raise ValueError(
            f"batch_size must be positive and the data must not be empty, got batch_size {batch_size} and "
            f"{len(source)} samples"
        )
