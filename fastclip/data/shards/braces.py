"""Expand patterns with braces to the names of shards."""

from __future__ import annotations

import re
from itertools import islice

from braceexpand import braceexpand

__all__ = ["brace_names"]

_MOST = 1_000_000
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?\}")


def brace_names(pattern: str) -> list[str]:
    """Return the names that ``{00000..00009}`` and ``{a,b}`` in `pattern` stand for, in order.

    Raises ValueError if there are more than a million names, or if a brace is not closed. Large ranges are refused
    before they use memory, except in lists whose elements contain several ranges.
    """
    # The lengths of the ranges are checked first, because braceexpand lists a whole range before it yields a name.
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
    # No real name has this many digits. int() would also refuse numbers of several thousand digits.
    if max(map(len, (start, end, step or ""))) > 18:
        return _MOST + 1
    return abs(int(end) - int(start)) // max(1, int(step or 1)) + 1
