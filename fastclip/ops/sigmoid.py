"""``fastclip::sigmoid_fwd`` and ``fastclip::sigmoid_bwd`` as torch ops.

The forward returns the loss and, if needed, its gradients, which together take only three products of the features. The
backward multiplies the gradients by the gradient of the loss. `_backends/reference` defines the function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip._backends import pick, reference, serving
from fastclip._backends.problem import Problem
from fastclip.ops.autocast import no_autocast, without_autocast
from fastclip.ops.backward import TAGS, apart, check_second_derivatives, keep, kept, vector_jacobian
from fastclip.ops.transforms import direct, needs_dense, recorded, transformed

__all__ = ["PAIRS", "Pairs", "pairs_of", "sigmoid_pairs"]

PAIRS = (
    "Tensor image, Tensor text, Tensor scale, Tensor bias, SymInt divisor, SymInt offset, bool normalize, "
    "str? backend, bool[] needs, Tensor? image_labels, Tensor? text_labels, bool exclude_self, Tensor? row_limits, "
    "Tensor? col_limits"
)
torch.library.define("fastclip::sigmoid_fwd", f"({PAIRS}) -> ({', '.join(['Tensor'] * 5)})", tags=TAGS)
torch.library.define(
    "fastclip::sigmoid_bwd", f"({PAIRS}, Tensor[] kept, Tensor d_loss) -> ({', '.join(['Tensor'] * 4)})", tags=TAGS
)


class Pairs(NamedTuple):
    """The first arguments of every op in this module, as `PAIRS` declares them."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor
    divisor: int
    offset: int
    normalize: bool
    backend: str | None
    needs: Sequence[bool]  # which of the four tensors need gradients
    image_labels: Tensor | None = None
    text_labels: Tensor | None = None
    exclude_self: bool = False
    row_limits: Tensor | None = None
    col_limits: Tensor | None = None

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.image, self.text, self.scale, self.bias

    def problem(self) -> Problem:
        labels = limits = None
        if self.image_labels is not None and self.text_labels is not None:
            labels = self.image_labels, self.text_labels
        if self.row_limits is not None and self.col_limits is not None:
            limits = self.row_limits, self.col_limits
        features = self.image, self.text, self.scale
        return Problem(*features, labels, self.offset, self.exclude_self, self.normalize, limits)


def pairs_of(p: Problem, bias: Tensor, divisor: int, backend: str | None, needs: Sequence[bool]) -> Pairs:
    """Return the first arguments of the ops for a problem."""
    options = divisor, p.offset, p.normalize, backend, needs
    (image_labels, text_labels), (row_limits, col_limits) = p.labels or (None, None), p.limits or (None, None)
    filters = image_labels, text_labels, p.exclude_self, row_limits, col_limits
    return Pairs(p.image, p.text, p.scale, bias, *options, *filters)


@torch.library.impl("fastclip::sigmoid_fwd", "default")
@without_autocast
def _fwd(image: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    pairs = Pairs(image, *args)
    p, dtype = pairs.problem(), reference.wide_dtype(image.device)
    loss, *grads = serving(pairs.backend, p).sigmoid_fwd(p, pairs.bias, pairs.divisor, pairs.needs, dtype)
    return loss, *(image.new_empty(0) if d is None else apart(d) for d in grads)


@torch.library.register_fake("fastclip::sigmoid_fwd")
def _fwd_fake(*args: Any) -> tuple[Tensor, ...]:
    pairs = Pairs(*args)
    image = pairs.image
    grads = (
        x.new_empty(x.shape, dtype=reference.saved_dtype(x)) if need else image.new_empty(0)
        for x, need in zip(pairs.inputs(), pairs.needs)
    )
    return image.new_empty((), dtype=reference.wide_dtype(image.device)), *grads


@torch.library.impl("fastclip::sigmoid_bwd", "default")
@without_autocast
def _bwd(*args: Any) -> tuple[Tensor, ...]:
    *of_pairs, kept_grads, d_loss = args
    pairs = Pairs(*of_pairs)
    module = pick(pairs.backend, pairs.image)[1]
    grads = [d.contiguous() if need else None for d, need in zip(kept_grads, pairs.needs)]
    out = module.sigmoid_bwd(pairs.inputs(), grads, d_loss)
    return tuple(d_loss.new_empty(0) if d is None else d for d in out)


@torch.library.register_fake("fastclip::sigmoid_bwd")
def _bwd_fake(*args: Any) -> tuple[Tensor, ...]:
    *of_pairs, _, d_loss = args
    pairs = Pairs(*of_pairs)
    return tuple(x.new_empty(x.shape) if need else d_loss.new_empty(0) for x, need in zip(pairs.inputs(), pairs.needs))


def _save_fwd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *grads = output
    keep(ctx, inputs, grads)
    ctx.mark_non_differentiable(*grads)  # second derivatives pass through sigmoid_bwd


def _fwd_backward(ctx: Any, d_loss: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    args, grads = kept(ctx)
    pairs, needs = Pairs(*args), list(ctx.needs_input_grad[:4])
    if any(need and not had for need, had in zip(needs, pairs.needs)):
        raise RuntimeError(
            "fastclip::sigmoid_fwd did not compute a gradient that is needed now: set the entry of this gradient in "
            "needs= to True"
        )
    return *_gradients(pairs._replace(needs=needs), grads, d_loss), *[None] * (len(args) - 4)


def _gradients(pairs: Pairs, grads: Sequence[Tensor | None], d_loss: Tensor) -> Sequence[Tensor | None]:
    """Return the gradients of the four inputs, computed by ``fastclip::sigmoid_bwd`` from `grads` of the forward."""
    grads = [d if need else None for d, need in zip(grads, pairs.needs)]
    if transformed(d_loss):  # batched, or with a tangent that the op would drop
        return reference.sigmoid_bwd(pairs.inputs(), grads, d_loss)
    tensors = [d_loss.new_empty(0) if d is None else d for d in grads]
    out = torch.ops.fastclip.sigmoid_bwd(*pairs, tensors, d_loss)
    return [d if need else None for d, need in zip(out, pairs.needs)]


torch.library.register_autograd("fastclip::sigmoid_fwd", _fwd_backward, setup_context=_save_fwd)


def _save_bwd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *of_pairs, grads, d_loss = inputs
    keep(ctx, of_pairs, [d_loss])
    ctx.grads = len(grads)


def _bwd_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Compute second derivatives: the forward is run again on the reference, so that autograd can see into it."""
    args, (d_loss,) = kept(ctx)
    pairs = Pairs(*args)
    check_second_derivatives("sigmoid_loss", pairs.backend, pairs.image)
    with torch.enable_grad(), no_autocast(pairs.image.device):
        # Views are differentiated in place of the arguments, because d_loss may depend on the features itself
        image, text, scale, bias, factor = (x.view_as(x) for x in (*pairs.inputs(), d_loss))
        p = pairs._replace(image=image, text=text, scale=scale).problem()
        _, *first = reference.sigmoid_fwd(p, bias, pairs.divisor, list(pairs.needs), factor.dtype)
        out = [None if d is None else factor.to(d.dtype) * d for d in first]
        *second, d_factor = vector_jacobian(out, grads, (image, text, scale, bias, factor))
    # The saved gradients receive no gradient, because they were recomputed from the features
    return *second, *[None] * (len(args) - 4), [None] * ctx.grads, d_factor


torch.library.register_autograd("fastclip::sigmoid_bwd", _bwd_backward, setup_context=_save_bwd)


class _Sigmoid(torch.autograd.Function):
    """The ops above without torch's dispatcher, for all backends except the reference.

    These backends do not need `without_autocast`, because autocast does not affect their operations.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        image, text, scale, bias, p, divisor, backend, needs, dtype, module = args
        loss, *grads = module.sigmoid_fwd(p, bias, divisor, needs, dtype)
        ctx.save_for_backward(image, text, scale, bias, *grads)
        ctx.options, ctx.divisor, ctx.backend, ctx.module = p[3:], divisor, backend, module
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        # Activation checkpointing lets saved tensors be read only once
        image, text, scale, bias, d_image, d_text, d_scale, d_bias = ctx.saved_tensors
        inputs = image, text, scale, bias
        if torch.is_grad_enabled():  # create_graph=True: the graph must contain the op
            p = Problem(image, text, scale, *ctx.options)
            pairs = pairs_of(p, bias, ctx.divisor, ctx.backend, list(ctx.needs_input_grad[:4]))
            out = _gradients(pairs, (d_image, d_text, d_scale, d_bias), d_loss)
        elif not direct(d_loss):  # a kernel cannot read d_loss at its address
            out = reference.sigmoid_bwd(inputs, (d_image, d_text, d_scale, d_bias), d_loss)
        else:
            # A hook of the user may have changed their layout. Scalars have no strides.
            d_image, d_text = [None if d is None else d.contiguous() for d in (d_image, d_text)]
            out = ctx.module.sigmoid_bwd(inputs, (d_image, d_text, d_scale, d_bias), d_loss)
        return *out, *[None] * 6


def sigmoid_pairs(
    p: Problem, bias: Tensor, *, divisor: int = 1, backend: str | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Return sum_ij softplus(-sign_ij (z_ij + bias)) / divisor, () in `dtype`, differentiable: see the reference.

    `dtype` is by default `reference.wide_dtype`. Gradients are divided by the divisor before they are rounded to a
    16-bit dtype.
    """
    tensors = p.image, p.text, p.scale, bias
    dtype = dtype or reference.wide_dtype(p.image.device)
    if needs_dense(backend, *tensors):
        with no_autocast(p.image.device):
            dense, *_ = reference.sigmoid_fwd(p, bias, divisor, [False] * 4, dtype)
        assert dense is not None
        return dense
    differentiable = torch.is_grad_enabled()
    needs = [differentiable and x.requires_grad for x in tensors]
    module = None if torch.compiler.is_compiling() or recorded(*tensors) else serving(backend, p)
    if module is None or module is reference:  # the op has the reference's second derivatives
        loss: Tensor = torch.ops.fastclip.sigmoid_fwd(*pairs_of(p, bias, divisor, backend, needs))[0]
        return loss.to(dtype)
    eager: Tensor = _Sigmoid.apply(*tensors, p, divisor, backend, needs, dtype, module)
    return eager
