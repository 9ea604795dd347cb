"""The sigmoid loss and its gradients in one pass over the blocks, as `reference` defines them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastclip._backends.cpu import native
from fastclip._backends.cpu.blocks import Features, Plan, normalized, threads
from fastclip._backends.native import address
from fastclip._backends.problem import Problem
from fastclip._backends.reference import saved_dtype

__all__ = ["sigmoid_fwd"]

_NONE = (None, None)


def sigmoid_fwd(
    p: Problem, bias: Tensor, divisor: int, needs: list[bool], dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """Compute `reference.sigmoid_fwd`, with three products if features need gradients, else with one."""
    image, text, s = p.image, p.text, p.scale.item()
    if p.normalize:
        M = image.shape[0]
        norms = image.new_empty(2 * (M + text.shape[0]), dtype=torch.float32)  # inv_norm and outer of both sides
        workers = threads(*image.shape)
        plan = Plan(normalized(image, norms, 0, workers), normalized(text, norms, 2 * M, workers))
    else:
        plan = Plan(Features(image), Features(text))
    labels = [y.int().contiguous() for y in p.labels] if p.labels else _NONE
    limits = [limit.float().contiguous() for limit in p.limits] if p.limits else _NONE
    places = map(address, (*labels, *limits)) if p.labels or p.limits else (0, 0, 0, 0)
    inv_norms = plan.image.inv_norm, plan.text.inv_norm
    problem = *inv_norms, s, bias.item(), *places, any(needs), p.offset, p.exclude_self
    d_image = image.new_empty(image.shape, dtype=saved_dtype(image)) if needs[0] else None
    d_text = text.new_empty(text.shape, dtype=saved_dtype(text)) if needs[1] else None
    loss = d_scale = d_bias = 0.0
    for dots in plan.backward(s / divisor, d_image, d_text):
        block_loss, block_d_scale, block_d_bias = native.module.sigmoid_fwd(*problem, *dots, plan.workers)
        loss, d_scale, d_bias = loss + block_loss, d_scale + block_d_scale, d_bias + block_d_bias
    return (
        image.new_full((), loss / divisor, dtype=dtype),
        d_image,
        d_text,
        p.scale.new_full((), d_scale / divisor) if needs[2] else None,
        bias.new_full((), d_bias / divisor) if needs[3] else None,
    )
