"""The order of samples, a function of the seed and the place in the run alone."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fastclip.data.loading.permutation import Permutation, mix

__all__ = ["Draw", "Order", "mix"]


class Draw(NamedTuple):
    """A sample in its turn."""

    epoch: int
    sample: int  # its index in the source


class Order:
    """Which samples every step takes, from the first to the last, whoever reads them.

    Each epoch is a `Permutation` of the samples, of which nothing is stored. With a batch up to the size of the data an
    epoch is as many whole batches as fit, and the rest of its permutation is left out; a larger batch takes samples of
    consecutive epochs.

    Args:
        size: number of samples, positive.
        batch_size: samples a step, over all processes, positive.
        seed: any integer.
    """

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        if size < 1 or batch_size < 1:
            raise ValueError(f"size and batch_size must be positive, got {size} samples and batches of {batch_size}")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self._permutation = lru_cache(maxsize=2)(self._permute)  # a batch may reach over an epoch's end

    @property
    def epoch_length(self) -> int:
        """Samples that an epoch draws."""
        return self.size - self.size % self.batch_size if self.batch_size <= self.size else self.size

    def steps(self, epochs: float) -> int:
        """Steps that draw `epochs` times the samples of an epoch, rounded up; at least 1."""
        if not (math.isfinite(epochs) and epochs >= 0):
            raise ValueError(f"epochs must be a number from 0 up, got {epochs}")
        # 1.1 is meant as eleven tenths: the float is a little more
        return max(1, math.ceil(Fraction(str(epochs)) * self.epoch_length / self.batch_size))

    def position(self, step: int) -> tuple[int, int]:
        """The epoch of a step's first sample, and how many steps began in that epoch before."""
        epoch, row = divmod(step * self.batch_size, self.epoch_length)
        return epoch, row // self.batch_size

    def draws(self, step: int, start: int, stop: int) -> list[Draw]:
        """Rows `start` to `stop` - 1 of a step's batch."""
        if not 0 <= start <= stop <= self.batch_size:
            raise ValueError(f"rows {start} to {stop} are not in a batch of {self.batch_size}")
        drawn: list[Draw] = []
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
