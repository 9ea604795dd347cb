"""Plans: everything that depends only on a problem's signature (shapes, strides, dtypes, options) is computed once.

With few rows a step waits for the host, so even the computed layout of a workspace is kept.
"""

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

# Every part of a workspace begins at a multiple of this many bytes. The compiled kernels assume multiples of 16. 64 is
# half a cache line of a GPU, two whole sectors of memory.
_LINE = 64
_MOST = 128  # plans kept, so that a caller with ever new shapes does not fill the memory

plans: dict[Any, Any] = {}  # plans of every kind, by signature


def remember(key: Any, plan: Any) -> Any:
    """Keep a plan under its key and return it. The first element of a key is the kind of plan."""
    if len(plans) >= _MOST:
        plans.clear()
    plans[key] = plan
    return plan


def cut(**sizes: int) -> SimpleNamespace:
    """Lay out parts of these sizes (bytes) in a workspace.

    Returns the first byte of each part under the part's name, and the `end` of the last.
    """
    starts, end = {}, 0
    for name, size in sizes.items():
        starts[name] = end
        end = ceil_div(end + size, _LINE) * _LINE
    return SimpleNamespace(**starts, end=end)


def plan_of(
    make: Callable[..., Any], image: Tensor, text: Tensor, scale: Tensor, about: Any, workspace: int | None = None
) -> tuple[Any, Tensor, Tensor]:
    """Return the plan ``make(image, text, *about)`` of a problem, and its features with contiguous rows.

    workspace: bytes that the plan may use; a plan made for another size is replaced. A backward passes None and
    thereby uses the plan of its forward, even if the setting has changed in between.
    """
    strides, text_strides = image.stride(), text.stride()
    if strides[1] != 1 or text_strides[1] != 1:
        image, text = with_rows(image), with_rows(text)
        strides, text_strides = image.stride(), text.stride()
    # Kernels are compiled for the alignment of their pointers. Only these three come from the caller and may be
    # misaligned; torch aligns everything that is allocated here.
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
