"""``fastclip::sigmoid_fwd`` and ``fastclip::sigmoid_bwd`` as torch ops.

The forward returns the loss and, where they are wanted, its gradients: three products of the features serve both. The
backward multiplies them with the gradient of the loss. `_backends/reference.py` states the function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastclip._backends import pick, reference, serving
from fastclip._backends.problem import Problem
from fastclip.ops.autocast import no_autocast, without_autocast
from fastclip.ops.second import check_second_derivatives, vector_jacobian
from fastclip.ops.transforms import direct, needs_dense, recorded, transformed

__all__ = ["sigmoid_pairs"]

_PROBLEM = (
    "Tensor image, Tensor text, Tensor scale, Tensor bias, SymInt divisor, SymInt offset, bool normalize, "
    "str? backend, bool[] needs"
)
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
torch.library.define("fastclip::sigmoid_fwd", f"({_PROBLEM}) -> ({', '.join(['Tensor'] * 5)})", tags=_TAGS)
torch.library.define(
    "fastclip::sigmoid_bwd", f"({_PROBLEM}, Tensor[] kept, Tensor d_loss) -> ({', '.join(['Tensor'] * 4)})", tags=_TAGS
)


def _problem(image: Tensor, text: Tensor, scale: Tensor, offset: int, normalize: bool) -> Problem:
    return Problem(image, text, scale, None, offset, False, normalize)


def _apart(d: Tensor) -> Tensor:
    """A gradient with memory of its own, as an op's outputs must have: a backend may allocate the scalars' together."""
    return d.contiguous() if d.dim() else d.clone()


@torch.library.impl("fastclip::sigmoid_fwd", "default")
@without_autocast
def _fwd(image: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    text, scale, bias, divisor, offset, normalize, backend, needs = args
    p = _problem(image, text, scale, offset, normalize)
    dtype = reference.wide_dtype(image.device)
    loss, *grads = serving(backend, p).sigmoid_fwd(p, bias, divisor, needs, dtype)
    return loss, *(image.new_empty(0) if d is None else _apart(d) for d in grads)


@torch.library.register_fake("fastclip::sigmoid_fwd")
def _fwd_fake(*args: Any) -> tuple[Tensor, ...]:
    *inputs, _, _, _, _, needs = args
    image = inputs[0]
    grads = (
        x.new_empty(x.shape, dtype=reference.saved_dtype(x)) if need else image.new_empty(0)
        for x, need in zip(inputs, needs)
    )
    return image.new_empty((), dtype=reference.wide_dtype(image.device)), *grads


@torch.library.impl("fastclip::sigmoid_bwd", "default")
@without_autocast
def _bwd(*args: Any) -> tuple[Tensor, ...]:
    *inputs, _, _, _, backend, needs, kept, d_loss = args
    module = pick(backend, inputs[0])[1]
    out = module.sigmoid_bwd(inputs, [d.contiguous() if need else None for d, need in zip(kept, needs)], d_loss)
    return tuple(d_loss.new_empty(0) if d is None else d for d in out)


@torch.library.register_fake("fastclip::sigmoid_bwd")
def _bwd_fake(*args: Any) -> tuple[Tensor, ...]:
    *inputs, _, _, _, _, needs, _, d_loss = args
    return tuple(x.new_empty(x.shape) if need else d_loss.new_empty(0) for x, need in zip(inputs, needs))


def _save_fwd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.mark_non_differentiable(*output[1:])  # whoever differentiates twice comes through sigmoid_bwd
    ctx.options, ctx.needs = inputs[4:8], inputs[8]


def _fwd_backward(ctx: Any, d_loss: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[:4]
    if any(need and not had for need, had in zip(needs, ctx.needs)):
        raise RuntimeError("fastclip::sigmoid_fwd was called with needs= that leave out a gradient now asked for")
    return *_gradients(ctx.saved_tensors, ctx.options, d_loss, needs), *[None] * 5


def _gradients(saved: Sequence[Any], options: Any, d_loss: Tensor, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    """Gradients of the four inputs by ``fastclip::sigmoid_bwd``, from the inputs and what the forward kept."""
    inputs, kept = saved[:4], [d if need else None for d, need in zip(saved[4:], needs)]
    if transformed(d_loss):  # batched, or with a tangent: gradients are its multiples
        return reference.sigmoid_bwd(inputs, kept, d_loss)
    everything = [d_loss.new_empty(0) if d is None else d for d in kept]
    out = torch.ops.fastclip.sigmoid_bwd(*inputs, *options, list(needs), everything, d_loss)
    return [d if need else None for d, need in zip(out, needs)]


torch.library.register_autograd("fastclip::sigmoid_fwd", _fwd_backward, setup_context=_save_fwd)


def _save_bwd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *problem, needs, kept, d_loss = inputs
    ctx.save_for_backward(*problem[:4], d_loss)
    ctx.options, ctx.needs, ctx.kept = problem[4:], needs, len(kept)


def _bwd_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Second derivatives, on the reference: the forward again in torch, so that autograd sees through it."""
    *saved, d_loss = ctx.saved_tensors
    divisor, offset, normalize, backend = ctx.options
    check_second_derivatives("sigmoid_loss", backend, saved[0])
    with torch.enable_grad(), no_autocast(saved[0].device):
        # Views, so that the derivatives stop here
        image, text, scale, bias, factor = (x.view_as(x) for x in (*saved, d_loss))
        p = _problem(image, text, scale, offset, normalize)
        _, *kept = reference.sigmoid_fwd(p, bias, divisor, list(ctx.needs), factor.dtype)
        out = [None if d is None else factor.to(d.dtype) * d for d in kept]
        *second, d_factor = vector_jacobian(out, grads, (image, text, scale, bias, factor))
    # `kept` get nothing: they were recomputed from the features above
    return *second, *[None] * 5, [None] * ctx.kept, d_factor


torch.library.register_autograd("fastclip::sigmoid_bwd", _bwd_backward, setup_context=_save_bwd)


class _Sigmoid(torch.autograd.Function):
    """The ops above without torch's dispatcher, by any backend but the reference: autocast changes nothing for them."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        image, text, scale, bias, divisor, offset, normalize, backend, needs, dtype, module, p = args
        loss, *kept = module.sigmoid_fwd(p, bias, divisor, needs, dtype)
        ctx.save_for_backward(image, text, scale, bias, *kept)
        ctx.options, ctx.module = (divisor, offset, normalize, backend), module
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: what a checkpoint computes again it gives once
        if torch.is_grad_enabled():  # whoever differentiates again has to find the op
            out = _gradients(saved, ctx.options, d_loss, ctx.needs_input_grad[:4])
        elif not direct(d_loss):  # torch has to see what is done with it
            out = reference.sigmoid_bwd(saved[:4], saved[4:], d_loss)
        else:
            # A hook of the user's may have had them; numbers have no strides
            kept = [None if d is None else d.contiguous() for d in saved[4:6]]
            out = ctx.module.sigmoid_bwd(saved[:4], [*kept, *saved[6:]], d_loss)
        return *out, None, None, None, None, None, None, None, None


@without_autocast
def _dense(image: Tensor, p: Problem, bias: Tensor, divisor: int, dtype: torch.dtype) -> Tensor:
    loss, *_ = reference.sigmoid_fwd(p, bias, divisor, [False] * 4, dtype)
    assert loss is not None
    return loss


def sigmoid_pairs(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    divisor: int = 1,
    offset: int = 0,
    normalize: bool = True,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """sum_ij softplus(-+(z_ij + bias)) / divisor, (); minus at the positives, column i + offset of row i.

    Differentiable; of `dtype`, or `reference.wide_dtype`. The divisor is in the gradients before they are rounded to
    16-bit features' dtype.
    """
    tensors = image, text, scale, bias
    dtype = dtype or reference.wide_dtype(image.device)
    if needs_dense(backend, *tensors):
        return _dense(image, _problem(image, text, scale, offset, normalize), bias, divisor, dtype)
    differentiable = torch.is_grad_enabled()
    needs = [differentiable and x.requires_grad for x in tensors]
    options = divisor, offset, normalize, backend, needs
    p = _problem(image, text, scale, offset, normalize)
    module = None if torch.compiler.is_compiling() or recorded(*tensors) else serving(backend, p)
    if module is None or module is reference:  # which has second derivatives
        loss: Tensor = torch.ops.fastclip.sigmoid_fwd(*tensors, *options)[0]
        return loss.to(dtype)
    eager: Tensor = _Sigmoid.apply(*tensors, *options, dtype, module, p)
    return eager
