"""Names of a package that are imported on first use (PEP 562), so that the command line starts fast.

A package with lazy names also imports them under ``TYPE_CHECKING``, for type checkers and for readers.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

__all__ = ["lazy_names", "uncollected"]


def lazy_names(namespace: dict[str, Any], modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package, which imports a name from its module and stores it in the package.

    Args:
        namespace: the package's ``globals()``.
        modules: maps each name to the full name of the module that defines it.
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
    """Disable Python's cyclic garbage collector inside the block, for imports.

    While torch and timm load, it would scan all their objects several times and free next to nothing. That takes about
    a sixth of their loading time.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
