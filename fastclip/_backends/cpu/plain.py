"""The mean loss without labels, made in the native code together with what its gradients need (csrc/cpu/loss.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastclip._backends.cpu import native
from fastclip._backends.cpu.blocks import Block, Features, Plan, normalized, threads, workspace

__all__ = ["plain_bwd", "plain_fwd", "plain_saved"]


_NORMS = native.module.LOSS_HEADER // 4 if native.module else 0  # where `saved` holds norms: images', then texts'


def plain_saved(N: int) -> int:
    """Return the size of `saved`, as `reference.plain_saved` does."""
    return (native.module.LOSS_HEADER + native.module.LOSS_ROW * N) // 4


def plain_fwd(
    image: Tensor, text: Tensor, scale: Tensor, image_weight: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Compute the mean loss of pairs, as `reference.plain_fwd` does."""
    N = image.shape[0]
    saved = image.new_empty(plain_saved(N), dtype=torch.float32)
    if normalize:
        workers = threads(*image.shape)
        plan = Plan(normalized(image, saved, _NORMS, workers), normalized(text, saved, _NORMS + 2 * N, workers))
    else:
        plan = Plan(Features(image), Features(text))
    value = 0.0
    problem = saved.data_ptr(), N, normalize, scale.item(), image_weight
    for block in plan.blocks:
        i0, i1, j0, j1 = block
        native_dot = plan.dots(block).data_ptr(), j1 - j0, i1 - i0, j1 - j0, i0, j0
        value = native.module.loss_fwd(*problem, *native_dot, plan.workers)
        workspace.keep(saved, block)
    return image.new_full((), value, dtype=torch.float32), saved


def plain_bwd(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    saved: Tensor,
    image_weight: float,
    normalize: bool,
    d_loss: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of that loss, as `reference.plain_bwd` does."""
    N = image.shape[0]
    at = saved.data_ptr()
    factor, large = native.module.loss_factor(at, N)
    if normalize:
        r, c = at + 4 * _NORMS, at + 4 * (_NORMS + 2 * N)
        outer = saved[_NORMS : _NORMS + 4 * N].view(4, N)[1::2] if large else (None, None)
        plan = Plan(Features(image, r, outer[0]), Features(text, c, outer[1]), owner=saved)
    else:
        plan = Plan(Features(image), Features(text), owner=saved)
    upstream, d_scale = d_loss.item(), 0.0

    def weigh(block: Block, dot: Tensor) -> None:
        nonlocal d_scale
        i0, i1, j0, j1 = block
        native_dot = dot.data_ptr(), j1 - j0, i1 - i0, j1 - j0, i0, j0
        d_scale += native.module.loss_bwd(at, N, *native_dot, plan.workers)

    d_image = image.new_empty(image.shape) if needs[0] else None
    d_text = text.new_empty(text.shape) if needs[1] else None
    plan.backward(weigh, factor * upstream, d_image, d_text)
    return d_image, d_text, scale.new_full((), d_scale * upstream) if needs[2] else None
