"""Shared parts of the tests: inputs, truth and tolerances, faulty data, processes that die, builds."""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def needs(*names: str) -> None:
    """Skip a test or a module unless packages are installed. A name is an extra of this package, or a package."""
    missing = sorted({package for name in names for package in _packages(name) if not _installed(package)})
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}", allow_module_level=True)


@functools.cache
def _packages(name: str) -> frozenset[str]:
    """Return the packages that an extra requires, or the name itself if it is not an extra."""
    found: set[str] = set()
    for requirement in map(Requirement, requires("fastclip-kernels") or ()):
        if requirement.marker and requirement.marker.evaluate({"extra": name}):
            extras = requirement.extras if requirement.name == "fastclip-kernels" else ()
            found.update(*map(_packages, extras) if extras else [{requirement.name}])
    return frozenset(found or {name})


@functools.cache
def _installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True
