"""Plans: what follows from a problem's signature is found once, such as where the parts of a workspace begin."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from fastclip.triton_kernels import launch
from fastclip.triton_kernels.launch import with_rows
from torch import Tensor

from fastclip.system import env
from fastclip.system.rounding import ceil_div

__all__ = ["cut", "plan_of", "remember"]

_LINE = 64  # bytes: every part of a workspace begins on one
_MOST = 128  # plans: whoever feeds ever new shapes must not fill the memory

plans: dict[Any, Any] = {}  # of every kind


def remember(key: Any, plan: Any) -> Any:
    """Keep a plan under its key, whose first element tells the kinds apart; return it."""
    if len(plans) >= _MOST:
        plans.clear()
    plans[key] = plan
    return plan


def cut(**sizes: int) -> SimpleNamespace:
    """Bytes at which parts of these sizes begin in a workspace, by name, and its `end`."""
    starts, end = {}, 0
    for name, size in sizes.items():
        starts[name] = end
        end = ceil_div(end + size, _LINE) * _LINE
    return SimpleNamespace(**starts, end=end)


def plan_of(
    make: Callable[..., Any], image: Tensor, text: Tensor, scale: Tensor, about: Any, workspace: int | None = None
) -> tuple[Any, Tensor, Tensor]:
    """The plan ``make(image, text, *about)`` of a problem, and its features as `with_rows` has them.

    A forward says how large a `workspace` there is; a backward goes on with the plan of its forward.
    """
    strides, text_strides = image.stride(), text.stride()
    if strides[1] != 1 or text_strides[1] != 1:
        image, text = with_rows(image), with_rows(text)
        strides, text_strides = image.stride(), text.stride()
    # Kernels are compiled for the alignment of what they are handed; the rest of it torch aligns
    aligned = image.data_ptr() % 16, text.data_ptr() % 16, scale.data_ptr() % 16
    precision = launch.fp32_products() if image.dtype is torch.float32 else "ieee"
    key = make, image.shape, text.shape, strides, text_strides, image.dtype, image.device, aligned, about, precision
    try:
        planned, plan = plans[key]
        if workspace is None or workspace == planned:
            return plan, image, text
    except KeyError:
        pass
    plan = make(image, text, *about)
    remember(key, (env.workspace_bytes("cuda"), plan))
    return plan, image, text
