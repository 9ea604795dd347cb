"""Many strings in little memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

__all__ = ["Strings"]


class Strings:
    """Strings by number, in one buffer.

    Worker processes that are forked share it. Of a list they would in time copy every page, because each string's
    reference count is written when it is read.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._bytes, self._ends = bytearray(), array("q", [0])
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        self._bytes += text.encode("utf-8", "surrogatepass")  # file names and JSON may hold lone surrogates
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        """`index` counts from 0 only."""
        if not 0 <= index < len(self):
            raise IndexError(f"{index} of {len(self)}")
        return self._bytes[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogatepass")
