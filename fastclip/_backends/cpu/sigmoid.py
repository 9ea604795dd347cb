"""The sigmoid loss with its gradients in one pass over the blocks; see `reference.py` for what it is."""

from __future__ import annotations

import torch
from torch import Tensor

from fastclip._backends.cpu import native
from fastclip._backends.cpu.blocks import Block, Plan, factors, features_of, inv_norms, native_block
from fastclip._backends.native import address
from fastclip._backends.problem import Problem
from fastclip._backends.reference import saved_dtype

__all__ = ["sigmoid_fwd"]


def sigmoid_fwd(p: Problem, bias: Tensor, divisor: int, needs: list[bool]) -> tuple[Tensor | None, ...]:
    """As `reference.sigmoid_fwd`: three products with gradients of the features, one without."""
    image, r = features_of(p.image, inv_norms(p.image, p.normalize), p.normalize)
    text, c = features_of(p.text, inv_norms(p.text, p.normalize), p.normalize)
    plan = Plan(image, text)
    s, b = float(p.scale), float(bias)
    image_factors, text_factors = factors(r, c, s)
    image_factors["inv_norm"], text_factors["inv_norm"] = r, c
    both = image_factors, text_factors
    sides = [native.module.SigmoidSide(**{name: address(x) for name, x in side.items()}) for side in both]
    sums = [0.0, 0.0, 0.0]  # loss, d_scale, d_bias

    def weigh(block: Block, dot: Tensor) -> None:
        native_dot = native_block(dot, block, p.offset)
        for k, part in enumerate(native.module.sigmoid_fwd(native_dot, *sides, b, any(needs), plan.workers)):
            sums[k] += part

    d_image = p.image.new_empty(p.image.shape, dtype=saved_dtype(p.image)) if needs[0] else None
    d_text = p.text.new_empty(p.text.shape, dtype=saved_dtype(p.text)) if needs[1] else None
    plan.backward(weigh, s / divisor, d_image, d_text)
    loss, d_scale, d_bias = (x / divisor for x in sums)
    return (
        torch.tensor(loss, dtype=torch.float64),
        d_image,
        d_text,
        p.scale.new_tensor(d_scale) if needs[2] else None,
        bias.new_tensor(d_bias) if needs[3] else None,
    )
