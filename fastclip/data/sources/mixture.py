"""Several sources as one, each drawn more or less often."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

from fastclip.data.faults import Tally
from fastclip.data.source import Record, Source, read_sample
from fastclip.data.sources.subset import Borrowed

__all__ = ["Mixture"]

_MOST = 1_000_000  # of a weight; Python's len() ends at 2^63
_GOLDEN = (math.sqrt(5) - 1) / 2


class Mixture(Borrowed):
    """Sources joined; an epoch draws round(weight size) samples of each.

    With a whole weight an epoch draws every sample of a source so many times. With a fraction it draws some, evenly
    spread over the source, and the next epoch goes on where it ended: every sample has been drawn before one is drawn
    once more. What is drawn is a function of the epoch and the index; `mixture[index]` is that of epoch 0.

    Classes are the sources' where all have the same, else there are none.

    Args:
        spec: as the user wrote it.
        sources: not empty.
        weights: the mean number of times that an epoch draws a sample of the source, one a source, positive.

    Raises:
        ValueError: a weight is above a million; or a source is so small, or its weight, that nothing of it would be
            drawn.
    """

    def __init__(self, spec: str, sources: Sequence[Source], weights: Sequence[Fraction]) -> None:
        self.spec, self._sources = spec, tuple(sources)
        self._draws = [round(weight * len(source)) for source, weight in zip(sources, weights, strict=True)]
        for source, weight, draws in zip(sources, weights, self._draws):
            if weight > _MOST:
                raise ValueError(f"{source.spec}: the weight must be at most {_MOST:,}, got {float(weight):g}")
            if draws < 1:
                raise ValueError(f"{source.spec}: {float(weight):g} times its {len(source)} samples are none")
        self._ends = list(accumulate(self._draws))
        self._strides = [
            _stride(len(source)) if draws % len(source) else 1 for source, draws in zip(sources, self._draws)
        ]
        self.passed = Tally()
        for source in dict.fromkeys(sources):
            if (passed := getattr(source, "passed", None)) is not None:
                self.passed.merge(passed.counts, passed.keys)
        first = sources[0]
        # a label is a place in its own source's list of classes, and means another class in another list
        self._with_classes = all(source.class_names == first.class_names for source in sources)
        self.class_names = first.class_names if self._with_classes else ()
        self.templates = first.templates if self._with_classes else ()

    @property
    def parts(self) -> Sequence[tuple[Source, int]]:
        """The sources, and how many samples an epoch draws of each."""
        return list(zip(self._sources, self._draws))

    def __len__(self) -> int:
        """Samples that an epoch draws."""
        return self._ends[-1]

    def read(self, index: int, *, epoch: int = 0, min_side: int | None = None) -> Record:
        """As `fastclip.data.source.read_sample`, in any epoch."""
        record = read_sample(*self._locate(index, epoch), min_side=min_side)
        return record if self._with_classes else record._replace(label=None)

    def key(self, index: int, *, epoch: int = 0) -> str:
        source, sample = self._locate(index, epoch)
        return source.key(sample)

    def _locate(self, index: int, epoch: int = 0) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{index} of {len(self)}")
        part = bisect_right(self._ends, index)
        source, draws = self._sources[part], self._draws[part]
        turn = epoch * draws + index - (self._ends[part] - draws)  # among all draws from the source, of all epochs
        return source, turn * self._strides[part] % len(source)


def _stride(size: int) -> int:
    """A step that comes to every one of `size` places in turn, and is far from those before: the golden section's."""
    stride = max(1, round(_GOLDEN * size))
    while math.gcd(stride, size) > 1:
        stride += 1
    return stride
