"""The order in which a training run draws samples.

The order is a function of the seed and the step alone, and is computed instead of stored. A resumed run, and a run with
another number of processes, workers or micro-batches, therefore draws the same samples in the same steps, and a
checkpoint need not store a state of the data.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fastclip.data.loading.permutation import Permutation, mix

__all__ = ["Draw", "Order", "mix"]


class Draw(NamedTuple):
    """One sample that a batch draws, with its epoch."""

    epoch: int
    sample: int  # index in the source


class Order:
    """The samples of every step of a run, independent of the process that reads them.

    Each epoch draws the samples in the order of a new `Permutation`. If the batch is not larger than the dataset, an
    epoch consists of as many whole batches as fit, and the rest of its permutation is left out. A larger batch takes
    the samples of consecutive epochs.

    Args:
        size: number of samples, positive.
        batch_size: samples per step over all processes, positive.
        seed: any integer.
    """

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        if size < 1 or batch_size < 1:
            raise ValueError(f"size and batch_size must be positive, got {size} samples and batches of {batch_size}")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self._permutation = lru_cache(maxsize=2)(self._permute)  # two: a large batch may reach into the next epoch

    @property
    def epoch_length(self) -> int:
        """The number of samples that an epoch draws."""
        # Whole batches only: a batch that spans two epochs may hold a sample twice.
        return self.size - self.size % self.batch_size if self.batch_size <= self.size else self.size

    def steps(self, epochs: float) -> int:
        """Return the number of steps that draw `epochs` times the samples of an epoch, rounded up and at least 1."""
        if not (math.isfinite(epochs) and epochs >= 0):
            raise ValueError(f"epochs must be finite and at least 0, got {epochs}")
        # The decimal text is exact: the float 1.1 is a little above eleven tenths and could round up to one step more.
        return max(1, math.ceil(Fraction(str(epochs)) * self.epoch_length / self.batch_size))

    def position(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step's first sample, and the number of earlier steps that began in that epoch."""
        epoch, row = divmod(step * self.batch_size, self.epoch_length)
        return epoch, row // self.batch_size

    def draws(self, step: int, start: int, stop: int) -> list[Draw]:
        """Return the draws in rows `start` to `stop` - 1 of the batch of a step."""
        if not 0 <= start <= stop <= self.batch_size:
            raise ValueError(f"rows {start} to {stop} are not in a batch of {self.batch_size}")
        drawn: list[Draw] = []
        # A place is the number of a draw, counted over the whole run. The rows of a step can therefore be computed
        # without the rows before them.
        place, end = step * self.batch_size + start, step * self.batch_size + stop
        while place < end:
            epoch, row = divmod(place, self.epoch_length)
            places = np.arange(row, min(row + end - place, self.epoch_length))
            indices = self._permutation(epoch)(places).tolist()
            drawn += [Draw(epoch, index) for index in indices]
            place += len(indices)
        return drawn

    def _permute(self, epoch: int) -> Permutation:
        return Permutation(self.size, mix(self.seed, epoch))
