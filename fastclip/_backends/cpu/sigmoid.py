"""The sigmoid loss with its gradients in one pass over the blocks; see `reference.py` for what it is."""

from __future__ import annotations

import torch
from torch import Tensor

from fastclip._backends.cpu import native
from fastclip._backends.cpu.blocks import Block, Features, Plan, normalized, threads
from fastclip._backends.problem import Problem
from fastclip._backends.reference import saved_dtype

__all__ = ["sigmoid_fwd"]


def sigmoid_fwd(
    p: Problem, bias: Tensor, divisor: int, needs: list[bool], dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """As `reference.sigmoid_fwd`: three products with gradients of the features, one without."""
    image, text, s = p.image, p.text, p.scale.item()
    if p.normalize:
        M = image.shape[0]
        norms = image.new_empty(2 * (M + text.shape[0]), dtype=torch.float32)
        workers = threads(*image.shape)
        plan = Plan(normalized(image, norms, 0, workers), normalized(text, norms, 2 * M, workers))
    else:
        plan = Plan(Features(image), Features(text))
    problem = plan.image.inv_norm, plan.text.inv_norm, s, bias.item(), any(needs), p.offset
    sums = [0.0, 0.0, 0.0]  # loss, d_scale, d_bias

    def weigh(block: Block, dot: Tensor) -> None:
        i0, i1, j0, j1 = block
        native_dot = dot.data_ptr(), j1 - j0, i1 - i0, j1 - j0, i0, j0
        for k, part in enumerate(native.module.sigmoid_fwd(*problem, *native_dot, plan.workers)):
            sums[k] += part

    d_image = image.new_empty(image.shape, dtype=saved_dtype(image)) if needs[0] else None
    d_text = text.new_empty(text.shape, dtype=saved_dtype(text)) if needs[1] else None
    plan.backward(weigh, s / divisor, d_image, d_text)
    loss, d_scale, d_bias = (x / divisor for x in sums)
    return (
        image.new_full((), loss, dtype=dtype),
        d_image,
        d_text,
        p.scale.new_full((), d_scale) if needs[2] else None,
        bias.new_full((), d_bias) if needs[3] else None,
    )
