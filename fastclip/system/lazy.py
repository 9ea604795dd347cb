"""Names of a package that are imported when they are first asked for (PEP 562), so that the command line answers fast.

A package that uses it imports the same names under ``TYPE_CHECKING``, for type checkers and for who reads it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

__all__ = ["lazy_names", "uncollected"]


def lazy_names(namespace: dict[str, Any], modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package, which finds a name in its module and keeps it in the package.

    Args:
        namespace: the package's ``globals()``.
        modules: full name of the module that each name is defined in.
    """

    def __getattr__(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {namespace['__name__']!r} has no attribute {name!r}")
        with uncollected():
            value = namespace[name] = getattr(import_module(modules[name]), name)
        return value

    return __getattr__


@contextmanager
def uncollected() -> Iterator[None]:
    """Import inside without Python's search for cyclic garbage.

    It would go through all that torch and timm make, several times while they load, and free next to nothing: about a
    sixth of the time that it takes to load them.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
