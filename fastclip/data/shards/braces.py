"""Names of shards from patterns with braces."""

from __future__ import annotations

import re
from itertools import islice

from braceexpand import braceexpand

__all__ = ["brace_names"]

_MOST = 1_000_000
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?\}")


def brace_names(pattern: str) -> list[str]:
    """Return the names that ``{00000..00009}`` and ``{a,b}`` in `pattern` stand for, in order.

    Raises ValueError where there are more than a million, and where a brace is not closed; before memory is used, but
    for lists whose elements have several ranges.
    """
    # a range is looked at first: braceexpand lists each one before it gives the first name
    names = None if any(_length(*match.groups()) > _MOST for match in _RANGE.finditer(pattern)) else _names(pattern)
    if names is None or len(names) > _MOST:
        raise ValueError(f"{pattern}: the braces stand for more than {_MOST:,} names")
    return names


def _names(pattern: str) -> list[str]:
    try:
        return list(islice(braceexpand(pattern), _MOST + 1))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{pattern}: {error}") from error


def _length(start: str, end: str, step: str | None) -> int:
    if max(map(len, (start, end, step or ""))) > 18:  # more digits than any name has; int() refuses thousands
        return _MOST + 1
    return abs(int(end) - int(start)) // max(1, int(step or 1)) + 1
