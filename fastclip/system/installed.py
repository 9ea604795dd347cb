"""Versions and data files of other installed packages, found without importing them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

__all__ = ["install_advice", "installed_file", "installed_version"]


def installed_file(package: str, name: str, *, what: str, install: str) -> Path:
    """Return the path of the file `name` of a package.

    Args:
        what: description of the file's content, for the message.
        install: name of the package for pip.

    Raises:
        ImportError: the package is not installed, or has no such file.
    """
    spec = find_spec(package)  # runs no code of the package
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / name
        if path.is_file():
            return path
    raise ImportError(f"{what} {name} comes with the package {install}, which is not installed: pip install {install}")


def installed_version(distribution: str) -> str:
    """Return the version of a distribution, by its name for pip, or "" if it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def install_advice(extra: str = "") -> str:
    """Return the advice to install fastclip, with the packages of an extra."""
    what = f"'.[{extra}]'" if extra else "."
    return f"run pip install {what} in the folder of fastclip's source code"
