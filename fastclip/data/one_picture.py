"""The rows of a table that have one picture, as one sample."""

from __future__ import annotations

from fastclip.data.faults import BadSample
from fastclip.data.identity import picture_places
from fastclip.data.source import Record, Source, read_sample
from fastclip.data.subset import Subset
from fastclip.data.table import Table

__all__ = ["one_a_picture"]


def one_a_picture(source: Source) -> Source:
    """A table as one sample a picture (`picture_places`), with the captions of all its rows, each once; another source
    as it is."""
    if not isinstance(source, Table):
        return source
    rows: dict[tuple[str, str], list[int]] = {}
    for index, place in enumerate(picture_places(source)):
        rows.setdefault(place, []).append(index)
    return source if len(rows) == len(source) else _Pictures(source, list(rows.values()))


class _Pictures(Subset):
    def __init__(self, source: Source, rows: list[list[int]]) -> None:
        super().__init__(source, [own[0] for own in rows])
        self._rows = rows

    def __getitem__(self, index: int) -> Record:
        return self.read(index)

    def read(self, index: int, *, min_side: int | None = None) -> Record:
        captions = self.captions(index)
        first = next(row for row in self._rows[index] if self._told(row))  # a row without a caption cannot be read
        return read_sample(self.source, first, min_side=min_side)._replace(captions=captions)

    def captions(self, index: int) -> tuple[str, ...]:
        texts = (text for row in self._rows[index] for text in self._told(row))
        return tuple(dict.fromkeys(texts)) or self.source.captions(self.indices[index])  # which raises

    def _told(self, row: int) -> tuple[str, ...]:
        try:
            return self.source.captions(row)
        except BadSample:
            return ()
