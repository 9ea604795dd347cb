"""Some samples of a source, as a source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastclip.data.source import Record, Source, picture_bytes, picture_place, read_sample, sample_fields

__all__ = ["Borrowed", "Subset", "evenly", "spread"]


class Borrowed:
    """Samples of other sources: `_locate` says of which, and at which index there."""

    def _locate(self, index: int) -> tuple[Source, int]:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Record:
        return self.read(index)

    def read(self, index: int, *, min_side: int | None = None) -> Record:
        """As `fastclip.data.source.read_sample`."""
        return read_sample(*self._locate(index), min_side=min_side)

    def captions(self, index: int) -> tuple[str, ...]:
        source, sample = self._locate(index)
        return source.captions(sample)

    def key(self, index: int) -> str:
        source, sample = self._locate(index)
        return source.key(sample)

    def picture_bytes(self, index: int) -> bytes | None:
        """As `fastclip.data.source.picture_bytes`."""
        return picture_bytes(*self._locate(index))

    def picture_place(self, index: int) -> tuple[str, str]:
        """As `fastclip.data.source.picture_place`."""
        return picture_place(*self._locate(index))

    def fields(self, index: int) -> dict[str, Any]:
        """As `fastclip.data.source.sample_fields`."""
        return sample_fields(*self._locate(index))


class Subset(Borrowed):
    """The samples of `source` at `indices`, in this order; `subset.indices[i]` is where sample i comes from.

    Raises:
        IndexError: while reading, an index that is not below the subset's length.
    """

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices
        self.spec, self.class_names, self.templates = source.spec, source.class_names, source.templates

    def __len__(self) -> int:
        return len(self.indices)

    def _locate(self, index: int) -> tuple[Source, int]:
        return self.source, self.indices[index]


def spread(size: int, most: int) -> Iterator[int]:
    """Yield at most `most` of the numbers from 0 to `size` - 1, evenly spread, in order."""
    count = min(size, most)
    return (k * size // count for k in range(count))


def evenly(source: Source, most: int | None) -> Source:
    """At most so many samples, evenly spread over the source; None for all."""
    if most is None or most >= len(source):
        return source
    return Subset(source, [*spread(len(source), most)])
