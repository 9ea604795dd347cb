"""Samples that cannot be used: what is wrong with each, and how many there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

__all__ = ["BadSample", "Fault", "Tally", "noting", "shown"]

_SHOWN = 3  # keys of a cause in a message


def shown(key: str) -> str:
    """Return `key` for a message: as it is, or quoted where a terminal would not print it, such as a line's end."""
    return key if key.isprintable() else ascii(key)


class Fault(NamedTuple):
    """Why a sample cannot be used."""

    cause: str  # "truncated image", "not an image", "empty caption" ...: a few words that many samples share
    key: str  # what messages call the sample
    reason: str  # what is wrong with this one


class BadSample(ValueError):
    """One sample cannot be used; those beside it can. Its text is ``KEY: REASON``."""

    def __init__(self, cause: str, key: str, reason: str) -> None:
        super().__init__(cause, key, reason)  # as they are: it is pickled on its way out of a worker
        self.fault = Fault(cause, key, reason)

    def __str__(self) -> str:
        return f"{shown(self.fault.key)}: {self.fault.reason}"


class Tally:
    """Faults counted by cause, with the first keys of each."""

    def __init__(self, faults: Iterable[Fault] = ()) -> None:
        self.counts: dict[str, int] = {}
        self.keys: dict[str, list[str]] = {}  # the first of every cause
        self.add(faults)

    @classmethod
    def of(cls, counts: Any, keys: Any) -> Tally:
        """Return the tally of `counts` and `keys` that a file holds; ValueError where they are something else."""
        found = cls()
        try:
            found.counts = {str(cause): int(count) for cause, count in counts.items()}
            found.keys = {cause: list(map(str, keys[cause])) for cause in found.counts}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError("the counts of what cannot be used are no such counts") from error
        return found

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def add(self, faults: Iterable[Fault]) -> list[Fault]:
        """Count them; returns the first of every cause that is new."""
        new = []
        for fault in faults:
            if fault.cause not in self.counts:
                new.append(fault)
            self.counts[fault.cause] = self.counts.get(fault.cause, 0) + 1
            keys = self.keys.setdefault(fault.cause, [])
            if len(keys) < _SHOWN and fault.key not in keys:
                keys.append(fault.key)
        return new

    def merge(self, counts: Mapping[str, int], keys: Mapping[str, Sequence[str]]) -> None:
        """Add another tally's `counts` and `keys`."""
        for cause, count in counts.items():
            self.counts[cause] = self.counts.get(cause, 0) + count
            known = self.keys.setdefault(cause, [])
            known += [key for key in keys[cause] if key not in known][: _SHOWN - len(known)]

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """Causes with their counts, the most frequent first."""
        return iter(sorted(self.counts.items(), key=lambda item: -item[1]))

    def __str__(self) -> str:
        """``3 not an image (a.jpg, b.jpg, c.jpg ...), 1 no caption (d.jpg)``, the most frequent first."""
        told = []
        for cause, count in self:
            keys = [shown(key) for key in self.keys[cause]]
            more = " ..." if len(keys) == _SHOWN < count else ""
            told.append(f"{count:,} {cause} ({', '.join(keys)}{more})")
        return ", ".join(told)


@contextmanager
def noting(problems: list[str] | None) -> Iterator[None]:
    """Append the message of an OSError or ValueError to `problems`, and go on; where that is None, raise it."""
    try:
        yield
    except (OSError, ValueError) as error:
        if problems is None:
            raise
        problems.append(str(error))
