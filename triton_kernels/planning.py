"""Plans: what follows from a problem's signature is found once, such as where the parts of a workspace begin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fastclip.triton_kernels import launch
from fastclip.triton_kernels.launch import cdiv, workspace_bytes
from torch import Tensor

__all__ = ["cut", "plan_of", "remember", "with_rows"]

_LINE = 64  # bytes: every part of a workspace begins on one
_MOST = 128

plans: dict[Any, Any] = {}  # of every kind


def remember(key: Any, plan: Any) -> Any:
    """Keep a plan under its key, whose first element tells the kinds apart; return it."""
    if len(plans) >= _MOST:
        plans.clear()
    plans[key] = plan
    return plan


def cut(*sizes: int) -> list[int]:
    """Bytes at which parts of these sizes begin in a workspace; last its end."""
    starts = [0]
    for size in sizes:
        starts.append(cdiv(starts[-1] + size, _LINE) * _LINE)
    return starts


def with_rows(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """The features in rows without gaps between columns."""
    image, text = (x if x.stride(1) == 1 else x.contiguous() for x in (image, text))
    return image, text


def plan_of(
    make: Callable[..., Any], image: Tensor, text: Tensor, scale: Tensor, about: Any, workspace: int | None = None
) -> tuple[Any, Tensor, Tensor]:
    """The plan ``make(image, text, *about, precision)`` of a problem, and its features as `with_rows` has them.

    A forward says how large a `workspace` there is; a backward goes on with the plan of its forward.
    """
    strides, text_strides = image.stride(), text.stride()
    if strides[1] != 1 or text_strides[1] != 1:
        image, text = with_rows(image, text)
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
    plan = make(image, text, *about, precision)
    remember(key, (workspace_bytes(), plan))
    return plan, image, text
