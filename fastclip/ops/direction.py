"""``fastclip::direction_fwd`` and ``fastclip::direction_bwd``: the loss of the rows alone, image -> text.

A row's log-sum-exp needs no other row. The forward therefore computes whole rows of logits, and returns the loss and,
if needed, its gradients, which together take only three products of the features. The backward multiplies the gradients
by the gradient of the loss. `_backends/reference` defines the function.
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
from fastclip.ops.contrastive import contrastive_statistics
from fastclip.ops.transforms import direct, needs_dense, recorded, transformed

__all__ = ["one_direction", "one_pass"]

_ROWS = (
    "Tensor image, Tensor text, Tensor scale, Tensor divisor, Tensor? image_labels, Tensor? text_labels, "
    "Tensor? row_count, SymInt offset, bool exclude_self, bool normalize, str? backend, bool[] needs"
)
torch.library.define("fastclip::direction_fwd", f"({_ROWS}) -> ({', '.join(['Tensor'] * 4)})", tags=TAGS)
torch.library.define(
    "fastclip::direction_bwd", f"({_ROWS}, Tensor[] kept, Tensor d_loss) -> ({', '.join(['Tensor'] * 3)})", tags=TAGS
)


class _Rows(NamedTuple):
    """The first arguments of both ops, as `_ROWS` declares them."""

    image: Tensor
    text: Tensor
    scale: Tensor
    divisor: Tensor
    image_labels: Tensor | None
    text_labels: Tensor | None
    row_count: Tensor | None
    offset: int
    exclude_self: bool
    normalize: bool
    backend: str | None
    needs: Sequence[bool]  # which of the first three tensors need gradients

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.image, self.text, self.scale

    def problem(self) -> Problem:
        labels = None
        if self.image_labels is not None and self.text_labels is not None:
            labels = self.image_labels, self.text_labels
        return Problem(self.image, self.text, self.scale, labels, self.offset, self.exclude_self, self.normalize)


@torch.library.impl("fastclip::direction_fwd", "default")
@without_autocast
def _fwd(image: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    rows = _Rows(image, *args)
    p, dtype = rows.problem(), reference.wide_dtype(image.device)
    module = serving(rows.backend, p)
    loss, *grads = module.direction_fwd(p, rows.row_count, rows.divisor, list(rows.needs), dtype)
    return loss, *(image.new_empty(0) if d is None else apart(d) for d in grads)


@torch.library.register_fake("fastclip::direction_fwd")
def _fwd_fake(*args: Any) -> tuple[Tensor, ...]:
    rows = _Rows(*args)
    image = rows.image
    grads = (
        x.new_empty(x.shape, dtype=reference.saved_dtype(x)) if need else image.new_empty(0)
        for x, need in zip(rows.inputs(), rows.needs)
    )
    return image.new_empty((), dtype=reference.wide_dtype(image.device)), *grads


@torch.library.impl("fastclip::direction_bwd", "default")
@without_autocast
def _bwd(*args: Any) -> tuple[Tensor, ...]:
    *of_rows, kept_grads, d_loss = args
    rows = _Rows(*of_rows)
    grads = [d.contiguous() if need else None for d, need in zip(kept_grads, rows.needs)]
    out = pick(rows.backend, rows.image)[1].direction_bwd(rows.inputs(), grads, d_loss)
    return tuple(d_loss.new_empty(0) if d is None else d for d in out)


@torch.library.register_fake("fastclip::direction_bwd")
def _bwd_fake(*args: Any) -> tuple[Tensor, ...]:
    *of_rows, _, d_loss = args
    rows = _Rows(*of_rows)
    return tuple(x.new_empty(x.shape) if need else d_loss.new_empty(0) for x, need in zip(rows.inputs(), rows.needs))


def _save_fwd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *grads = output
    keep(ctx, inputs, grads)
    ctx.mark_non_differentiable(*grads)  # second derivatives pass through direction_bwd


def _fwd_backward(ctx: Any, d_loss: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    args, grads = kept(ctx)
    rows, needs = _Rows(*args), list(ctx.needs_input_grad[:3])
    if any(need and not had for need, had in zip(needs, rows.needs)):
        raise RuntimeError(
            "fastclip::direction_fwd did not compute a gradient that is needed now: set the entry of this gradient in "
            "needs= to True"
        )
    return *_gradients(rows._replace(needs=needs), grads, d_loss), *[None] * (len(args) - 3)


def _gradients(rows: _Rows, grads: Sequence[Tensor | None], d_loss: Tensor) -> Sequence[Tensor | None]:
    """Return the gradients of the three inputs, by ``fastclip::direction_bwd`` from `grads` of the forward."""
    grads = [d if need else None for d, need in zip(grads, rows.needs)]
    if transformed(d_loss):  # batched, or with a tangent that the op would drop
        return reference.direction_bwd(rows.inputs(), grads, d_loss)
    tensors = [d_loss.new_empty(0) if d is None else d for d in grads]
    out = torch.ops.fastclip.direction_bwd(*rows, tensors, d_loss)
    return [d if need else None for d, need in zip(out, rows.needs)]


torch.library.register_autograd("fastclip::direction_fwd", _fwd_backward, setup_context=_save_fwd)


def _save_bwd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *of_rows, grads, d_loss = inputs
    keep(ctx, of_rows, [d_loss])
    ctx.grads = len(grads)


def _bwd_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Compute second derivatives: the forward is run again on the reference, so that autograd can see into it."""
    args, (d_loss,) = kept(ctx)
    rows = _Rows(*args)
    check_second_derivatives("contrastive_loss", rows.backend, rows.image)
    with torch.enable_grad(), no_autocast(rows.image.device):
        # Views are differentiated in place of the arguments, because d_loss may depend on the features itself
        image, text, scale, factor = (x.view_as(x) for x in (*rows.inputs(), d_loss))
        p = rows._replace(image=image, text=text, scale=scale).problem()
        _, *first = reference.direction_fwd(p, rows.row_count, rows.divisor, list(rows.needs), factor.dtype)
        out = [None if d is None else factor.to(d.dtype) * d for d in first]
        *second, d_factor = vector_jacobian(out, grads, (image, text, scale, factor))
    # The saved gradients receive no gradient, because they were recomputed from the features
    return *second, *[None] * (len(args) - 3), [None] * ctx.grads, d_factor


torch.library.register_autograd("fastclip::direction_bwd", _bwd_backward, setup_context=_save_bwd)


class _Direction(torch.autograd.Function):
    """The ops above without torch's dispatcher, for all backends except the reference.

    These backends do not need `without_autocast`, because autocast does not affect their operations.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *of_rows, dtype, module, p = args
        rows = _Rows(*of_rows)
        loss, *grads = module.direction_fwd(p, rows.row_count, rows.divisor, rows.needs, dtype)
        keep(ctx, of_rows, grads)
        ctx.module = module
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        args, grads = kept(ctx)
        rows = _Rows(*args)
        if torch.is_grad_enabled():  # create_graph=True: the graph must contain the op
            out = _gradients(rows._replace(needs=list(ctx.needs_input_grad[:3])), grads, d_loss)
        elif not direct(d_loss):  # a kernel cannot read d_loss at its address
            out = reference.direction_bwd(rows.inputs(), grads, d_loss)
        else:
            grads = tuple(None if d is None else d.contiguous() for d in grads)  # a hook may have changed their layout
            out = ctx.module.direction_bwd(rows.inputs(), grads, d_loss)
        return *out, *[None] * len(args)


def one_pass(backend: str | None, image: Tensor, text: Tensor) -> bool:
    """Return True if the backend computes the loss of one direction in one pass.

    Otherwise the loss is computed from the rows' statistics, with 8 M N D operations.
    """
    module = pick(backend, image)[1]
    return hasattr(module, "direction_fwd") and bool(module.direction_fits(image, text))


def one_direction(
    p: Problem, count: Tensor | None, divisor: int | Tensor, backend: str | None, dtype: torch.dtype
) -> Tensor:
    """Return the sum of the rows' losses / divisor, () in `dtype`, differentiable.

    count: number of positives of every row, (M,), or None without labels.
    """
    if not one_pass(backend, p.image, p.text):
        side, _ = contrastive_statistics(p, backend)
        return (reference.row_losses(side, count).sum() / divisor).to(dtype)
    tensors = p.image, p.text, p.scale
    if not isinstance(divisor, Tensor):
        divisor = p.image.new_ones((), dtype=torch.int64) * divisor  # `new_full` would be a constant of a graph
    if needs_dense(backend, *tensors):
        with no_autocast(p.image.device):
            dense, *_ = reference.direction_fwd(p, count, divisor, [False] * 3, dtype)
        assert dense is not None
        return dense
    differentiable = torch.is_grad_enabled()
    needs = [differentiable and x.requires_grad for x in tensors]
    image_labels, text_labels = p.labels or (None, None)
    problem = p.image, p.text, p.scale, divisor, image_labels, text_labels, count, p.offset, p.exclude_self, p.normalize
    rows = _Rows(*problem, backend, needs)
    module = None if torch.compiler.is_compiling() or recorded(*tensors) else serving(backend, p)
    if module is None or module is reference:  # the op has the reference's second derivatives
        loss: Tensor = torch.ops.fastclip.direction_fwd(*rows)[0]
        return loss.to(dtype)
    eager: Tensor = _Direction.apply(*rows, dtype, module, p)
    return eager
