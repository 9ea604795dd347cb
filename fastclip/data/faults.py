"""Faults of samples that cannot be used, counted by cause."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

__all__ = ["BadSample", "Fault", "Tally", "escaped", "in_threads", "noting", "shown"]

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")
_THREADS = 16  # they wait for the disk, or for the network behind it
_SHOWN = 3  # keys of a cause in a message
_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\x1b": "\\E", "\\": "\\\\", "'": "\\'"}


def shown(text: str) -> str:
    """Return the text for a message: as it is, or quoted where a terminal obeys, or cannot show, a character of it.

    The quotes are those of ``ls``, which a shell reads as the bytes of the name. Line ends and tabs are quoted, too.
    """
    if text.isprintable():
        return text
    return "$'" + "".join(map(escaped, text)) + "'"


def escaped(character: str) -> str:
    """Return the character as it stands within the quotes of `shown`."""
    known = _ESCAPES.get(character)
    if known is not None or character.isprintable():
        return known or character
    # a byte of a name that is not UTF-8, or else, from JSON, half of a surrogate pair
    undecoded = "surrogateescape" if "\udc80" <= character <= "\udcff" else "surrogatepass"
    return "".join(f"\\{byte:03o}" for byte in character.encode("utf-8", undecoded))


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
        tally = cls()
        try:
            tally.counts = {str(cause): int(count) for cause, count in counts.items()}
            tally.keys = {cause: list(map(str, keys[cause])) for cause in tally.counts}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError("the counts of what cannot be used are no such counts") from error
        return tally

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def count(self, cause: str, key: str) -> None:
        self.counts[cause] = self.counts.get(cause, 0) + 1
        keys = self.keys.setdefault(cause, [])
        if len(keys) < _SHOWN and key not in keys:
            keys.append(key)

    def add(self, faults: Iterable[Fault]) -> list[Fault]:
        """Count them; returns the first of every cause that is new."""
        new = []
        for fault in faults:
            if fault.cause not in self.counts:
                new.append(fault)
            self.count(fault.cause, fault.key)
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
        parts = []
        for cause, count in self:
            keys = [shown(key) for key in self.keys[cause]]
            more = " ..." if len(keys) == _SHOWN < count else ""
            parts.append(f"{count:,} {cause} ({', '.join(keys)}{more})")
        return ", ".join(parts)

    def also_holds(self) -> str:
        """Return ``; it holds 3 .xmp (a.xmp, b.xmp, c.xmp)`` for an error about what holds nothing else, or ""."""
        return f"; it holds {self}" if self else ""


@contextmanager
def noting(problems: list[str] | None) -> Iterator[None]:
    """Append the message of an OSError or ValueError to `problems`, and go on; where that is None, raise it."""
    try:
        yield
    except (OSError, ValueError) as error:
        if problems is None:
            raise
        problems.append(str(error))


def in_threads(work: Callable[[_Key], _Value], keys: Sequence[_Key], problems: list[str] | None) -> dict[_Key, _Value]:
    """Return work(key) of every key, in order, by several threads, each within `noting`; keys that fail are left out.

    Processes that start at once, as the ranks of a run do, each begin elsewhere and find what others have written.
    """
    with ThreadPoolExecutor(min(_THREADS, len(keys)) or 1) as pool:
        futures = {key: pool.submit(work, key) for key in random.Random().sample(keys, len(keys))}
        values = {}
        try:
            for key in keys:
                with noting(problems):
                    values[key] = futures[key].result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return values
