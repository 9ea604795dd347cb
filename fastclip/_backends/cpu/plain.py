"""The mean loss without labels, made in the native code together with what its gradients need (csrc/cpu/loss.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastclip._backends.cpu import native
from fastclip._backends.cpu.blocks import Block, Features, Plan, threads, workspace

__all__ = ["plain_bwd", "plain_fwd", "plain_saved"]


def plain_saved(N: int) -> int:
    """As `reference.plain_saved`."""
    return (native.module.LOSS_HEADER + native.module.LOSS_ROW * N) // 4


def _sides(at: int, N: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Addresses of the images' inv_norm and outer in the `saved` at this address, and of the texts'."""
    at, floats = at + native.module.LOSS_HEADER, 4 * N
    return (at, at + floats), (at + 2 * floats, at + 3 * floats)


def _outer(saved: Tensor, address: int, N: int) -> Tensor:
    start = (address - saved.data_ptr()) // 4
    return saved[start : start + N]


def plain_fwd(
    image: Tensor, text: Tensor, scale: Tensor, image_weight: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    """As `reference.plain_fwd`."""
    N, D = image.shape
    saved = image.new_empty(plain_saved(N), dtype=torch.float32)
    at = saved.data_ptr()
    images, texts = Features(image), Features(text)
    if normalize:
        (r, image_outer), (c, text_outer) = _sides(at, N)
        workers = threads(N, D)
        if images.norms(r, image_outer, workers):
            images = Features(image, r, _outer(saved, image_outer, N))
        if texts.norms(c, text_outer, workers):
            texts = Features(text, c, _outer(saved, text_outer, N))
    plan = Plan(images, texts)
    value = 0.0
    problem = at, N, normalize, scale.item(), image_weight
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
    """As `reference.plain_bwd`."""
    N = image.shape[0]
    at = saved.data_ptr()
    factor, large = native.module.loss_factor(at, N)
    if normalize:
        (r, image_outer), (c, text_outer) = _sides(at, N)
        images = Features(image, r, _outer(saved, image_outer, N) if large else None)
        texts = Features(text, c, _outer(saved, text_outer, N) if large else None)
    else:
        images, texts = Features(image), Features(text)
    plan = Plan(images, texts, owner=saved)
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
