"""The sigmoid loss with its gradients in one pass over the blocks; see `reference.py` for what it is."""

from __future__ import annotations

import torch
from torch import Tensor

from fastclip._backends.cpu import native
from fastclip._backends.cpu.blocks import Block, Plan, factors, inv_norms, native_block
from fastclip._backends.native import address
from fastclip._backends.problem import Problem
from fastclip._backends.reference import saved_dtype

__all__ = ["sigmoid_fwd"]


def sigmoid_fwd(p: Problem, bias: Tensor, divisor: int, needs: list[bool]) -> tuple[Tensor | None, ...]:
    """As `reference.sigmoid_fwd`: three products with gradients of the features, one without."""
    plan = Plan(p, inv_norms(p.image, p.normalize), inv_norms(p.text, p.normalize))
    s, b = float(p.scale), float(bias)
    image, text = factors(plan.image, plan.text, s)
    image["inv_norm"], text["inv_norm"] = plan.image.inv_norm, plan.text.inv_norm
    sides = [native.module.SigmoidSide(**{name: address(x) for name, x in side.items()}) for side in (image, text)]
    threads = torch.get_num_threads()
    sums = [0.0, 0.0, 0.0]  # loss, d_scale, d_bias

    def weigh(block: Block, dot: Tensor) -> None:
        native_dot = native_block(dot, block, p.offset)
        for k, part in enumerate(native.module.sigmoid_fwd(native_dot, *sides, b, any(needs), threads)):
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
