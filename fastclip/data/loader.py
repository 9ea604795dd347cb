"""Samples of a source as batches, read ahead by worker processes; the same numbers however many there are."""

from __future__ import annotations

import hashlib
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from fastclip import _env
from fastclip.data.batch import Batch
from fastclip.data.mixture import Mixture
from fastclip.data.order import Draw, Order, mix
from fastclip.data.source import Record, Source, read_sample

__all__ = ["evaluation_batches", "training_batches"]

Transform = Callable[[Image.Image], Tensor]  # -> (3, H, W) float32
Tokenize = Callable[[list[str]], Tensor]  # B texts -> (B, L) int64

# Micro-batches that workers hold ready at most: each takes three of the files that a process may have open, often
# 1,024.
_READY = 128


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
) -> Iterator[list[Batch]]:
    """This rank's micro-batches of every step from `first_step` to `last_step` - 1.

    The samples of a step are `Order`'s. Which caption a sample has, and what a random `transform` does with its
    picture, are functions of the seed, the epoch and the sample alone: the ranks' batches together are bit by bit the
    same for any number of ranks and workers and any `micro_batch`, and a run that goes on at `first_step` gets what it
    would have got. The caller's random numbers (torch, numpy, random) are left as they were.

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

    Raises:
        ValueError: a number is out of range; or, while iterating, a picture or caption is damaged, with its key.
        OSError: while iterating, a file cannot be read, with its key.
        RuntimeError: while iterating, a worker was killed; from torch.
    """
    _check(rank=rank, ranks=ranks, workers=workers)
    if not 0 <= first_step <= last_step:
        raise ValueError(f"steps must run from 0 up, got first_step {first_step} and last_step {last_step}")
    if batch_size < ranks:
        raise ValueError(f"batch_size must be at least the {ranks} ranks, got {batch_size}")
    start, stop = rank * batch_size // ranks, (rank + 1) * batch_size // ranks
    size = stop - start if micro_batch is None else micro_batch
    if size < 1:
        raise ValueError(f"micro_batch must be positive, got {micro_batch}")
    order = Order(len(source), batch_size, seed)
    rows = [(a, min(a + size, stop)) for a in range(start, stop, size)]
    pieces = (order.draws(step, *piece) for step in range(first_step, last_step) for piece in rows)
    samples = _Training(source, transform, tokenize, seed, min_side)
    loaded = _load(samples, pieces, workers, ready=len(rows), pin_memory=pin_memory)
    return ([_own_batch(next(loaded)) for _ in rows] for _ in range(first_step, last_step))


def evaluation_batches(
    source: Source, transform: Transform, *, batch_size: int, rank: int = 0, ranks: int = 1, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every sample once over the ranks: images (B, 3, H, W), their indices (B,) int64 and labels (B,) int64.

    Rank r takes the indices r, r + ranks, ... in this order. Every rank yields the same number of batches, of the same
    sizes, so that collectives stay in step: where its samples are fewer, sample 0 is added with index -1. Labels are
    -1 where there are no classes. Raises as `training_batches`.
    """
    _check(rank=rank, ranks=ranks, workers=workers)
    if batch_size < 1 or not len(source):
        raise ValueError(f"batch_size must be positive and data not empty, got {batch_size} of {len(source)} samples")
    share = -(-len(source) // ranks)
    indices = list(range(rank, len(source), ranks))
    indices += [-1] * (share - len(indices))
    pieces = (indices[a : a + batch_size] for a in range(0, share, batch_size))
    loaded = _load(_Evaluation(source, transform), pieces, workers)
    return ((_own(images), _own(found), _own(labels)) for images, found, labels in loaded)


class _Training(Dataset[Batch]):
    def __init__(
        self, source: Source, transform: Transform, tokenize: Tokenize, seed: int, min_side: int | None
    ) -> None:
        self._source, self._transform, self._tokenize = source, transform, tokenize
        self._seed, self._min_side = seed, min_side

    def __getitem__(self, draws: Sequence[Draw]) -> Batch:
        images, captions, labels, keys = [], [], [], []
        for draw in draws:
            record = self._read(draw)
            seed = mix(self._seed, draw.epoch, draw.sample)
            images.append(_transformed(self._transform, record, seed))
            captions.append(record.captions[mix(seed, 1) % len(record.captions)])  # not one of the transform's numbers
            labels.append(_text_label(record.captions[0]) if record.label is None else record.label)
            keys.append(record.key)
        # a stack that a worker makes in the memory it shares, else it would be copied there
        return Batch(default_collate(images), self._tokenize(captions), torch.tensor(labels), tuple(keys))

    def _read(self, draw: Draw) -> Record:
        if isinstance(self._source, Mixture):
            return self._source.read(draw.sample, epoch=draw.epoch, min_side=self._min_side)
        return read_sample(self._source, draw.sample, min_side=self._min_side)


class _Evaluation(Dataset[tuple[Tensor, Tensor, Tensor]]):
    def __init__(self, source: Source, transform: Transform) -> None:
        self._source, self._transform = source, transform

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        images, labels = [], []
        for index in indices:
            record = self._source[max(index, 0)]
            images.append(_transformed(self._transform, record, mix(max(index, 0))))
            labels.append(-1 if record.label is None or index < 0 else record.label)
        return default_collate(images), torch.tensor(indices), torch.tensor(labels)


def _transformed(transform: Transform, record: Record, seed: int) -> Tensor:
    # torch.manual_seed would seed the GPUs too, from which the caller's dropout draws
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        return transform(record.image)
    except Exception as error:
        raise ValueError(f"{record.key}: the transform failed: {type(error).__name__}: {error}") from error


@contextmanager
def _random_states_kept() -> Iterator[None]:
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def _text_label(text: str) -> int:
    """63 bits that differ where texts do; the same on every machine."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class _Failure(NamedTuple):
    """An error on its way out of a worker: raised there, DataLoader would bury its message in tracebacks."""

    kind: type[Exception]
    message: str


class _Worker(Dataset[Any]):
    """Answers a list of draws or indices with their batch, or with what failed."""

    def __init__(self, samples: Dataset[Any]) -> None:
        self._samples = samples

    def __getitem__(self, piece: Any) -> Any:
        try:
            with _random_states_kept():
                return self._samples[piece]
        except (OSError, ValueError) as error:
            return _Failure(OSError if isinstance(error, OSError) else ValueError, str(error))


def _load(
    samples: Dataset[Any], pieces: Iterator[Any], workers: int, *, ready: int = 1, pin_memory: bool = False
) -> Iterator[Any]:
    """samples[piece] of every piece, in order; workers have about `ready` of them ready."""
    loader: DataLoader[Any] = DataLoader(
        _Worker(samples),
        sampler=pieces,
        batch_size=None,  # a piece is a batch
        collate_fn=_same,
        num_workers=workers,
        prefetch_factor=max(2, -(-min(ready, _READY) // workers)) if workers else None,
        # forked workers share the source's memory, and the transform may be any function; Python 3.14 would not fork
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        worker_init_fn=_leave_group,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else it draws from the caller's
    )
    with _env.tokenizers_without_threads():
        loaded = iter(loader)  # starts the workers
    for found in loaded:
        if isinstance(found, _Failure):
            raise found.kind(found.message)
        yield found


def _same(found: Any) -> Any:
    return found


def _leave_group(worker: int) -> None:
    """Ctrl-C, and the SIGTERM of torchrun or a scheduler, go to a group of processes: the trainer decides what ends."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def _own_batch(batch: Batch) -> Batch:
    images, ids, labels, keys = batch
    return Batch(_own(images), _own(ids), _own(labels), tuple(keys))  # pinning may make a list of the keys


def _own(tensor: Tensor) -> Tensor:
    """Out of memory shared with a worker, of which every tensor keeps a file open."""
    return tensor.clone() if tensor.is_shared() else tensor


def _check(*, rank: int, ranks: int, workers: int) -> None:
    if not 0 <= rank < ranks:
        raise ValueError(f"rank must be from 0 to ranks - 1, got rank {rank} of {ranks}")
    if workers < 0:
        raise ValueError(f"workers must not be negative, got {workers}")
