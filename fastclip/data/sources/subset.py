"""A part of a source's samples, as a source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastclip.data.source import Record, Source, picture_bytes, picture_place, read_sample, sample_fields

__all__ = ["Borrowed", "Subset", "evenly", "spread"]


class Borrowed:
    """Base class of sources whose samples belong to other sources."""

    def _locate(self, index: int) -> tuple[Source, int]:
        """Return the source that holds sample `index`, and the sample's index in that source."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Record:
        return self.read(index)

    def read(self, index: int, *, min_side: int | None = None) -> Record:
        """Return sample `index`; see `fastclip.data.source.read_sample`."""
        return read_sample(*self._locate(index), min_side=min_side)

    def captions(self, index: int) -> tuple[str, ...]:
        source, sample = self._locate(index)
        return source.captions(sample)

    def key(self, index: int) -> str:
        source, sample = self._locate(index)
        return source.key(sample)

    def picture_bytes(self, index: int) -> bytes | None:
        """Return the bytes of the image's file; see `fastclip.data.source.picture_bytes`."""
        return picture_bytes(*self._locate(index))

    def picture_place(self, index: int) -> tuple[str, str]:
        """Return the file that holds the image and the image's name in it; see `fastclip.data.source.picture_place`."""
        return picture_place(*self._locate(index))

    def fields(self, index: int) -> dict[str, Any]:
        """Return the other fields of the sample; see `fastclip.data.source.sample_fields`."""
        return sample_fields(*self._locate(index))


class Subset(Borrowed):
    """The samples of `source` at `indices`, in this order. Sample i is sample `subset.indices[i]` of the source.

    Raises:
        IndexError: while reading, the index is not below the length of the subset.
    """

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices
        self.spec, self.class_names, self.templates = source.spec, source.class_names, source.templates

    def __len__(self) -> int:
        return len(self.indices)

    def _locate(self, index: int) -> tuple[Source, int]:
        return self.source, self.indices[index]


def spread(size: int, most: int) -> Iterator[int]:
    """Yield at most `most` of the numbers from 0 to `size` - 1, evenly spread and in order."""
    count = min(size, most)
    return (k * size // count for k in range(count))


def evenly(source: Source, most: int | None) -> Source:
    """Return a source with at most `most` samples, evenly spread over `source`; None keeps all."""
    if most is None or most >= len(source):
        return source
    return Subset(source, [*spread(len(source), most)])
