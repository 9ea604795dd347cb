"""Several sources joined into one, with weights."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

from fastclip.data.faults import Tally
from fastclip.data.source import Record, Source, read_sample
from fastclip.data.sources.subset import Borrowed

__all__ = ["Mixture", "sample_count", "sample_position"]

_MOST = 1_000_000  # the largest weight, so that len() of a mixture stays below Python's limit of 2^63
_GOLDEN = (math.sqrt(5) - 1) / 2


class Mixture(Borrowed):
    """Several sources as one. An epoch draws round(weight * size) samples from each of them.

    With an integer weight, an epoch draws every sample of the source that many times. With a fraction, an epoch draws
    samples that are evenly spread over the source, and the next epoch continues with others: no sample is drawn again
    before every other sample has been drawn. The sample is a function of the epoch and the index, so that a resumed run
    needs no state. `mixture[index]` is the sample of epoch 0.

    The mixture has classes if all sources have the same classes.

    Args:
        spec: the mixture's name on the command line, as the user wrote it.
        sources: at least one source.
        weights: for each source, the mean number of times that an epoch draws a sample, positive.

    Raises:
        ValueError: a weight is above a million, or so small that no sample of its source would be drawn.
    """

    def __init__(self, spec: str, sources: Sequence[Source], weights: Sequence[Fraction]) -> None:
        self.spec, self._sources = spec, tuple(sources)
        self._draws = [round(weight * len(source)) for source, weight in zip(sources, weights, strict=True)]
        for source, weight, draws in zip(sources, weights, self._draws):
            if weight > _MOST:
                raise ValueError(f"{source.spec}: the weight must be at most {_MOST:,}, got {float(weight):g}")
            if draws < 1:
                raise ValueError(
                    f"{source.spec}: the weight {float(weight):g} is too small: it draws none of {len(source)} samples"
                )
        self._ends = list(accumulate(self._draws))
        self._strides = [
            _stride(len(source)) if draws % len(source) else 1 for source, draws in zip(sources, self._draws)
        ]
        self.passed = Tally()
        self._starts: dict[Source, int] = {}  # positions of the sources' first samples
        self.samples = 0  # number of different samples, drawn or not
        for source in dict.fromkeys(sources):
            self._starts[source] = self.samples
            self.samples += len(source)
            if (passed := getattr(source, "passed", None)) is not None:
                self.passed.merge(passed.counts, passed.keys)
        first = sources[0]
        # A label is an index into the class names of its source: the same number is another class in another source.
        self._with_classes = all(source.class_names == first.class_names for source in sources)
        self.class_names = first.class_names if self._with_classes else ()
        self.templates = first.templates if self._with_classes else ()

    @property
    def parts(self) -> Sequence[tuple[Source, int]]:
        """The sources, each with the number of samples that an epoch draws from it."""
        return list(zip(self._sources, self._draws))

    def __len__(self) -> int:
        """Return the number of samples that an epoch draws."""
        return self._ends[-1]

    def read(self, index: int, *, epoch: int = 0, min_side: int | None = None) -> Record:
        """Return the sample at `index` of an epoch; see `fastclip.data.source.read_sample`."""
        record = read_sample(*self._locate(index, epoch), min_side=min_side)
        return record if self._with_classes else record._replace(label=None)

    def key(self, index: int, *, epoch: int = 0) -> str:
        source, sample = self._locate(index, epoch)
        return source.key(sample)

    def position(self, index: int, *, epoch: int = 0) -> int:
        """Return the number of a sample, below `samples`, which is the same whenever the sample is drawn."""
        source, sample = self._locate(index, epoch)
        return self._starts[source] + sample

    def _locate(self, index: int, epoch: int = 0) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{index} of {len(self)}")
        part = bisect_right(self._ends, index)
        source, draws = self._sources[part], self._draws[part]
        # `turn` counts the draws from this source over all epochs, so that a fraction continues where it stopped.
        turn = epoch * draws + index - (self._ends[part] - draws)
        return source, turn * self._strides[part] % len(source)


def sample_position(source: Source, index: int, epoch: int) -> int:
    """Return the number of sample `index` of an epoch, the same in every epoch and below `sample_count`."""
    return source.position(index, epoch=epoch) if isinstance(source, Mixture) else index


def sample_count(source: Source) -> int:
    """Return the number of different samples of a source, whether or not an epoch draws all of them."""
    return source.samples if isinstance(source, Mixture) else len(source)


def _stride(size: int) -> int:
    """Return a stride that visits every one of `size` places before it repeats one, and spreads the visits evenly.

    The stride is the golden section of `size`, rounded, or the next number that has no common divisor with `size`.
    """
    stride = max(1, round(_GOLDEN * size))
    while math.gcd(stride, size) > 1:
        stride += 1
    return stride
