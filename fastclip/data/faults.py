"""Faults that make samples unusable, counted by cause."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

__all__ = ["BadSample", "Fault", "Tally", "escaped", "in_threads", "noting", "shown"]

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")
_THREADS = 16  # more than the cores of most machines: the threads wait for the disk or the network
_SHOWN = 3  # keys per cause in a message
_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\x1b": "\\E", "\\": "\\\\", "'": "\\'"}


def shown(text: str) -> str:
    """Return the text as a message shows it: unchanged if it is printable, else quoted.

    Quoting keeps control characters away from the terminal, which would obey them. The quotes are those of ``ls``: a
    shell reads them back as the bytes of the name. Line ends and tabs are quoted too.
    """
    if text.isprintable():
        return text
    return "$'" + "".join(map(escaped, text)) + "'"


def escaped(character: str) -> str:
    """Return the character as it appears within the quotes of `shown`."""
    known = _ESCAPES.get(character)
    if known is not None or character.isprintable():
        return known or character
    # A name that is not UTF-8 holds its bytes as U+DC80 to U+DCFF; JSON may hold other lone surrogates.
    undecoded = "surrogateescape" if "\udc80" <= character <= "\udcff" else "surrogatepass"
    return "".join(f"\\{byte:03o}" for byte in character.encode("utf-8", undecoded))


class Fault(NamedTuple):
    """The reason why one sample cannot be used, and the cause under which it is counted."""

    cause: str  # "truncated image", "not an image", "empty caption" ...: a few words that many samples share
    key: str  # the name by which messages refer to the sample
    reason: str  # what is wrong with this sample


class BadSample(ValueError):
    """Raised for one sample that cannot be used, while other samples can. The text is ``KEY: REASON``."""

    def __init__(self, cause: str, key: str, reason: str) -> None:
        super().__init__(cause, key, reason)  # not a single text, because unpickling passes these arguments to __init__
        self.fault = Fault(cause, key, reason)

    def __str__(self) -> str:
        return f"{shown(self.fault.key)}: {self.fault.reason}"


class Tally:
    """Faults counted by cause, with the first keys of each."""

    def __init__(self, faults: Iterable[Fault] = ()) -> None:
        self.counts: dict[str, int] = {}
        self.keys: dict[str, list[str]] = {}  # the first keys of every cause
        self.add(faults)

    @classmethod
    def of(cls, counts: Any, keys: Any) -> Tally:
        """Return the tally that was stored in a file as `counts` and `keys`.

        Raises ValueError if they are not valid counts and lists of keys.
        """
        tally = cls()
        try:
            tally.counts = {str(cause): int(count) for cause, count in counts.items()}
            tally.keys = {cause: list(map(str, keys[cause])) for cause in tally.counts}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError("the counts of unusable samples are damaged") from error
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
        """Count the faults and return the first fault of every cause that is new to the tally."""
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
        """Iterate over the causes with their counts, the most frequent first."""
        return iter(sorted(self.counts.items(), key=lambda item: -item[1]))

    def __str__(self) -> str:
        """Return ``3 not an image (a.jpg, b.jpg, c.jpg ...), 1 no caption (d.jpg)``, the most frequent first."""
        parts = []
        for cause, count in self:
            keys = [shown(key) for key in self.keys[cause]]
            more = " ..." if len(keys) == _SHOWN < count else ""
            parts.append(f"{count:,} {cause} ({', '.join(keys)}{more})")
        return ", ".join(parts)

    def also_holds(self) -> str:
        """Return ``; it holds 3 .xmp (a.xmp, b.xmp, c.xmp)``, or "" for an empty tally.

        The text ends an error message about a folder or a shard without usable samples.
        """
        return f"; it holds {self}" if self else ""


@contextmanager
def noting(problems: list[str] | None) -> Iterator[None]:
    """Suppress an OSError or ValueError and append its message to `problems`; raise it if `problems` is None."""
    try:
        yield
    except (OSError, ValueError) as error:
        if problems is None:
            raise
        problems.append(str(error))


def in_threads(work: Callable[[_Key], _Value], keys: Sequence[_Key], problems: list[str] | None) -> dict[_Key, _Value]:
    """Call work(key) for every key in several threads and return the results by key, in the order of `keys`.

    The errors of a key are handled as by `noting`, and a key that fails is left out. The work is started in a random
    order: the ranks of a run start at the same time, and each then begins with other files and finds the rest already
    indexed or copied by the other ranks.
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
