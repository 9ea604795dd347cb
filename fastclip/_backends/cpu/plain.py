"""The mean loss without labels, computed in native code together with what its gradients need (csrc/cpu/loss.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastclip._backends.cpu import native
from fastclip._backends.cpu.blocks import Features, Plan, normalized, threads, workspace

__all__ = ["plain_bwd", "plain_fwd", "plain_saved"]


# Where inv_norm and outer of both sides begin in `saved`
_NORMS = native.module.LOSS_HEADER // 4 if native.module else 0


def plain_saved(N: int) -> int:
    """Return how many fp32 numbers `plain_fwd` saves for `plain_bwd` with N pairs."""
    return (native.module.LOSS_HEADER + native.module.LOSS_ROW * N) // 4


def plain_fwd(
    image: Tensor, text: Tensor, scale: Tensor, image_weight: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Compute `reference.plain_fwd`, the mean loss of pairs."""
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
        _, dots = plan.dots(block)
        value = native.module.loss_fwd(*problem, *dots, plan.workers)
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
    """Compute `reference.plain_bwd`, the gradients of that loss."""
    N, place = image.shape[0], saved.data_ptr()
    factor, large = native.module.loss_factor(place, N)
    if normalize:
        r, c = place + 4 * _NORMS, place + 4 * (_NORMS + 2 * N)
        image_outer = text_outer = None
        if large:
            _, image_outer, _, text_outer = saved[_NORMS : _NORMS + 4 * N].view(4, N)
        plan = Plan(Features(image, r, image_outer), Features(text, c, text_outer), owner=saved)
    else:
        plan = Plan(Features(image), Features(text), owner=saved)
    d_image = image.new_empty(image.shape) if needs[0] else None
    d_text = text.new_empty(text.shape) if needs[1] else None
    upstream, d_scale = d_loss.item(), 0.0
    for dots in plan.backward(factor * upstream, d_image, d_text):
        d_scale += native.module.loss_bwd(place, N, *dots, plan.workers)
    return d_image, d_text, scale.new_full((), d_scale * upstream) if needs[2] else None
