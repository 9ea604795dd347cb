"""Loading of the native modules fastclip._cpu and fastclip._cuda, with the reason if one cannot be loaded."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.resources
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["address", "bare_clone", "load"]

_SUFFIXES = (*importlib.machinery.EXTENSION_SUFFIXES, "_build_report.txt")
_IMPORT = {  # written out, because tests/package/test_layering.py reads imports from the source
    "_cpu": lambda: importlib.import_module("fastclip._cpu"),
    "_cuda": lambda: importlib.import_module("fastclip._cuda"),
}


def load(name: str) -> tuple[Any, str | None]:
    """Return the module and None, or None and the reason."""
    try:
        return _IMPORT[name](), None
    except ImportError as error:
        report = importlib.resources.files("fastclip") / f"{name}_build_report.txt"
        if report.is_file():
            return None, f"the native module was not built: {report.read_text().strip()}"
        if (clone := bare_clone()) is not None:
            return None, f"fastclip is imported from {clone}, which has no native modules built for this Python"
        return None, f"the native module fastclip.{name} does not load ({error})"


def bare_clone() -> Path | None:
    """Return the clone whose sources were imported instead of an installation, or None.

    That happens if Python is started in the root of a clone.
    """
    folder = Path(str(importlib.resources.files("fastclip")))
    built = any((folder / f"{name}{suffix}").exists() for name in _IMPORT for suffix in _SUFFIXES)
    return folder.parent if (folder.parent / "csrc").is_dir() and not built else None


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
