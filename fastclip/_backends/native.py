"""The native modules fastclip._cpu and fastclip._cuda, or the reason why one is not there."""

from __future__ import annotations

import importlib
import importlib.resources
from typing import Any

from torch import Tensor

__all__ = ["address", "load"]

_IMPORT = {  # written out: tests/package/test_layering.py reads what is imported from the source
    "_cpu": lambda: importlib.import_module("fastclip._cpu"),
    "_cuda": lambda: importlib.import_module("fastclip._cuda"),
}


def load(name: str) -> tuple[Any, str | None]:
    """The module and None, or None and the reason."""
    try:
        return _IMPORT[name](), None
    except ImportError as error:
        report = importlib.resources.files("fastclip") / f"{name}_build_report.txt"
        if report.is_file():
            return None, f"the native module was not built: {report.read_text().strip()}"
        return None, f"the native module fastclip.{name} does not load ({error})"


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
