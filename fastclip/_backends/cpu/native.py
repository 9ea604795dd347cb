"""The native module fastclip._cpu, or the reason why there is none."""

from __future__ import annotations

import importlib
import importlib.resources
from typing import Any

from torch import Tensor

from fastclip import _env

__all__ = ["address", "missing", "module"]

module: Any = None
_missing: str | None = None
try:
    module = importlib.import_module("fastclip._cpu")
except ImportError as error:
    _missing = f"the native module fastclip._cpu does not load ({error})"
    _report = importlib.resources.files("fastclip") / "_build_report.txt"
    if _report.is_file():
        _missing = f"the native module was not built: {_report.read_text().strip()}"
else:
    try:
        module.select_isa(_env.cpu_isa())
    except ValueError:
        _missing = f"FASTCLIP_CPU_ISA={_env.cpu_isa()!r} is not one that this processor runs"


def missing() -> str | None:
    return _missing


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
