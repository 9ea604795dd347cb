"""bfloat16 in Triton's interpreter, which multiplies its bits as integers and truncates where a GPU rounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

_CONVERT, _DOT = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot


def _convert(x: Any, source: Any, target: Any, rounding: Any) -> Any:
    if (source, target) == (tl.bfloat16, tl.float32):
        return x.view(np.uint16).astype(np.uint32) << 16
    if (source, target) == (tl.float32, tl.bfloat16):
        return torch.from_numpy(np.array(x)).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return _CONVERT(x, source, target, rounding)


def _dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
    if a.dtype.scalar == tl.bfloat16:
        a, b = (self.cast_impl(x, tl.float32) for x in (a, b))
    return _DOT(self, a, b, *args)


def mend_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "_convert_float", _convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _dot)
