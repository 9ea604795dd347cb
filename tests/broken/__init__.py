"""The table of promises: what users rely on, the tests that hold it, and ways to break it.

A module has the promises of one part of the package. `python tests/breaks.py` breaks them again.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import NamedTuple


class Break(NamedTuple):
    """A change of one file, after which one of the promise's tests must fail."""

    what: str
    file: str  # relative to the repository
    old: str  # occurs exactly once in the file
    new: str  # takes the place of `old`; "" removes it


class Promise(NamedTuple):
    """A sentence of docs/promises.md, listed there under the question that it answers."""

    question: str
    text: str
    tests: list[str]  # file::function, relative to tests/; the page shows the first one's file
    breaks: list[Break]


def promises() -> list[Promise]:
    """Return the promises of every module, in the order of the modules' names."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [promise for name in names for promise in importlib.import_module(f"{__name__}.{name}").PROMISES]
