"""``fastclip::sigmoid_fwd`` as a torch op: the sum over all pairs and, where wanted, its gradients in the same pass.

Three products of the features serve loss and gradients together; the backward only multiplies what the forward kept.
`_backends/reference.py` states the function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastclip._backends import pick, reference
from fastclip._backends.problem import Problem
from fastclip.ops.second import check_second_derivatives, vector_jacobian

__all__ = ["sigmoid_sum"]

torch.library.define(
    "fastclip::sigmoid_fwd",
    "(Tensor image, Tensor text, Tensor scale, Tensor bias, int offset, bool normalize, bool[] needs, str? backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def _problem(image: Tensor, text: Tensor, scale: Tensor, offset: int, normalize: bool) -> Problem:
    return Problem(image, text, scale, None, offset, False, normalize)


@torch.library.impl("fastclip::sigmoid_fwd", "default")
def _fwd(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    offset: int,
    normalize: bool,
    needs: list[bool],
    backend: str | None,
) -> tuple[Tensor, ...]:
    loss, *grads = pick(backend, image)[1].sigmoid_fwd(_problem(image, text, scale, offset, normalize), bias, needs)
    return loss, *(image.new_empty(0) if d is None else d.contiguous() for d in grads)


@torch.library.register_fake("fastclip::sigmoid_fwd")
def _fwd_fake(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    offset: int,
    normalize: bool,
    needs: list[bool],
    backend: str | None,
) -> tuple[Tensor, ...]:
    grads = (
        x.new_empty(x.shape, dtype=reference.saved_dtype(x)) if need else image.new_empty(0)
        for x, need in zip((image, text, scale, bias), needs)
    )
    return image.new_empty((), dtype=reference.wide_dtype(image.device)), *grads


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, offset, normalize, needs, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.options, ctx.needs, ctx.backend = (offset, normalize), needs, backend


def _backward(ctx: Any, d_loss: Tensor | None, *d_grads: Tensor | None) -> tuple[Any, ...]:
    inputs, kept = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
    missed = [need for need, had in zip(ctx.needs_input_grad[:4], ctx.needs) if need and not had]
    if missed:
        raise RuntimeError("fastclip::sigmoid_fwd was called with needs= that leave out a gradient now asked for")
    if any(d is not None for d, had in zip(d_grads, ctx.needs) if had):  # somebody differentiates the gradients
        return *_second(ctx, inputs, (d_loss, *d_grads)), None, None, None, None
    if d_loss is None:
        return (None,) * 8
    return (
        *(
            (d * d_loss.to(d.dtype if d.dtype != torch.bfloat16 else torch.float32)).to(x.dtype) if need else None
            for d, x, need in zip(kept, inputs, ctx.needs_input_grad)
        ),
        None,
        None,
        None,
        None,
    )


def _second(ctx: Any, saved: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    check_second_derivatives("sigmoid_loss", ctx.backend, saved[0])
    with torch.enable_grad():
        # Views, so that the derivatives stop here
        inputs = [x.view_as(x) for x in saved]
        image, text, scale, bias = inputs
        out = reference.sigmoid_fwd(_problem(image, text, scale, *ctx.options), bias, list(ctx.needs))
        return vector_jacobian(out, grads, inputs)


torch.library.register_autograd("fastclip::sigmoid_fwd", _backward, setup_context=_save)


def sigmoid_sum(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    offset: int = 0,
    normalize: bool = True,
    backend: str | None = None,
) -> Tensor:
    """sum_ij softplus(-+(z_ij + bias)), (); minus at the positives, column i + offset of row i. Differentiable."""
    tensors = image, text, scale, bias
    needs = [torch.is_grad_enabled() and x.requires_grad for x in tensors]
    loss: Tensor = torch.ops.fastclip.sigmoid_fwd(*tensors, offset, normalize, needs, backend)[0]
    return loss
