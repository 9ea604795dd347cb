"""Read a dataset from end to end and report its size, its unusable samples and the reading speed."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import BatchSampler, Dataset

from fastclip.data.faults import BadSample, Fault, Tally
from fastclip.data.loading.watchdog import Watch
from fastclip.data.loading.workers import load, naming_dead_workers
from fastclip.data.source import Source
from fastclip.data.sources.subset import spread

__all__ = ["Report", "check_source"]

_PIECE = 16  # samples that a worker reads at a time


class Report(NamedTuple):
    """The counts, faults, image sizes and seconds of one pass over a source."""

    samples: int  # samples that were read
    usable: int
    captions: int  # of the usable samples
    faults: Tally
    pixels: tuple[tuple[int, int], ...]  # width and height of the smallest, median and largest image; () without any
    seconds: float

    @property
    def bad_share(self) -> float:
        return self.faults.total / max(1, self.samples)


def check_source(
    source: Source,
    *,
    workers: int = 0,
    max_samples: int | None = None,
    transform: Callable[[Image.Image], Any] | None = None,
) -> Report:
    """Read every sample once, in order.

    Args:
        workers: number of processes that read. With 0 the calling process reads.
        max_samples: the largest number of samples to read, evenly spread over the source. None reads all.
        transform: applied to every image, so that its time is measured too.

    Raises:
        ValueError: `max_samples` or `workers` is out of range.
        ChildProcessError: a worker was killed.
    """
    if workers < 0 or (max_samples is not None and max_samples < 1):
        raise ValueError(f"workers must be at least 0 and max_samples at least 1, got {workers} and {max_samples}")
    count = len(source) if max_samples is None else min(len(source), max_samples)
    pieces = BatchSampler(spread(len(source), count), _PIECE, drop_last=False)
    watch = Watch(source, workers)
    faults, captions, widths, heights = Tally(), 0, array("q"), array("q")
    begin = time.perf_counter()
    with naming_dead_workers():
        for piece in load(_Check(watch, transform), pieces, watch):
            for result in piece:
                if isinstance(result, Fault):
                    faults.add([result])
                else:
                    captions += result.captions
                    widths.append(result.width)
                    heights.append(result.height)
    seconds = time.perf_counter() - begin
    return Report(count, len(widths), captions, faults, _sizes(widths, heights), seconds)


class _Sample(NamedTuple):
    captions: int
    width: int
    height: int


class _Check(Dataset[list[Any]]):
    def __init__(self, watch: Watch, transform: Callable[[Image.Image], Any] | None) -> None:
        self._watch, self._transform = watch, transform

    def __getitem__(self, indices: Sequence[int]) -> list[_Sample | Fault]:
        return [self._sample(index) for index in indices]

    def _sample(self, index: int) -> _Sample | Fault:
        try:
            record = self._watch.read(index)
        except BadSample as bad:
            return bad.fault
        except (OSError, ValueError) as error:  # a shard has disappeared, for example: the others are still read
            return Fault("unreadable shard", self._watch.source.key(index), str(error))
        if self._transform is not None:
            try:
                self._transform(record.image)
            except MemoryError:
                raise
            except Exception as error:  # a transform is the user's code and may raise anything
                return Fault("failed transform", record.key, f"the transform failed: {type(error).__name__}: {error}")
        return _Sample(len(record.captions), *record.image.size)


def _sizes(widths: array[int], heights: array[int]) -> tuple[tuple[int, int], ...]:
    if not widths:
        return ()
    order = np.argsort(np.array(widths) * np.array(heights), kind="stable")
    return tuple((widths[k], heights[k]) for k in (order[0], order[len(order) // 2], order[-1]))
