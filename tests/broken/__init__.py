"""The table of promises, a module a part of the package; see tests/breaks.py."""

from __future__ import annotations

from typing import NamedTuple


class Break(NamedTuple):
    what: str
    file: str
    old: str  # occurs once in the file
    new: str


class Promise(NamedTuple):
    text: str
    tests: tuple[str, ...]  # file::function
    breaks: tuple[Break, ...]
