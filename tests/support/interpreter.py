"""Fixes of Triton's interpreter: bfloat16, whose bits it multiplies as integers and truncates, and its speed."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from fastclip.triton_kernels import features, gradients, planning
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


def widen_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels that process rows take 64 rows per program instead of a GPU's 4 or 8, since the interpreter's time is
    mostly spent per program. backends/test_triton.py keeps the real sizes.
    """
    for sizes in (features.NORMS, gradients.FINISH):
        assert sizes["BLOCK"] < 64
        monkeypatch.setitem(sizes, "BLOCK", 64)
    monkeypatch.setattr(planning, "plans", {})


@functools.cache
def replace_language_once() -> None:
    """Save half of the interpreter's time. At every call of a device function it searches the language's modules for
    functions to replace, although the launch of the enclosing kernel has replaced them all.
    """
    real, replaced = interpreter._patch_lang, set()

    def patch_lang(fn: Any) -> Any:
        found = {value.__name__ for value in fn.__globals__.values() if inspect.ismodule(value)}
        found &= {tl.__name__, tl.core.__name__}
        if found and found <= replaced:
            return interpreter._LangPatchScope()
        scope = real(fn)
        if not replaced:  # a launch, which restores everything at its end
            restore = scope.restore
            scope.restore = lambda: (restore(), replaced.clear())
        replaced.update(found)
        return scope

    interpreter._patch_lang = patch_lang
