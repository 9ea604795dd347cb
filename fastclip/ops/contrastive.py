"""``fastclip::contrastive_fwd``, ``contrastive_bwd`` and ``contrastive_maxima`` as torch ops.

The forward returns statistics of z_ij = scale r_i c_j <image_i, text_j>. The loss is computed from them in torch
(`losses/contrastive.py`), so autograd supplies its derivatives with respect to the statistics, and the backward op
turns these derivatives into gradients of the features and the scale. `_backends/reference` defines what the ops
compute.

An op takes and returns flat lists of tensors. `arguments` and `flat` convert a `Problem` and two `Side`s to lists, and
`problem_of` and `by_side` convert the lists back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastclip._backends import reference, serving
from fastclip._backends.problem import Problem, Side, SideGrads, Sides, in_turn
from fastclip.ops.autocast import no_autocast, without_autocast
from fastclip.ops.backward import TAGS, check_second_derivatives, keep, kept, vector_jacobian
from fastclip.ops.transforms import needs_dense

__all__ = [
    "PROBLEM",
    "arguments",
    "by_side",
    "contrastive_maxima",
    "contrastive_statistics",
    "derivatives",
    "flat",
    "merge_logsumexp",
    "problem_of",
]

PROBLEM = (
    "Tensor image, Tensor text, Tensor scale, Tensor? image_labels, Tensor? text_labels, SymInt offset, "
    "bool exclude_self, bool normalize, str? backend, Tensor? row_limits, Tensor? col_limits"
)
torch.library.define("fastclip::contrastive_fwd", f"({PROBLEM}) -> ({', '.join(['Tensor'] * 8)})", tags=TAGS)
torch.library.define(
    "fastclip::contrastive_bwd",
    f"({PROBLEM}, Tensor[] stats, Tensor[] grads, bool[] needs) -> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)
torch.library.define("fastclip::contrastive_maxima", f"({PROBLEM}) -> ({', '.join(['Tensor'] * 12)})", tags=TAGS)

_Kind = TypeVar("_Kind", Side, SideGrads)


def arguments(p: Problem, backend: str | None) -> tuple[Any, ...]:
    """Return the first arguments of every op in this module, as `PROBLEM` declares them."""
    image, text, scale, labels, *options, limits = p
    return image, text, scale, *(labels or (None, None)), *options, backend, *(limits or (None, None))


def problem_of(args: Sequence[Any]) -> tuple[Problem, str | None]:
    """Return the problem and the backend of an op's first arguments: the inverse of `arguments`."""
    image, text, scale, image_labels, text_labels, *options, backend, row_limits, col_limits = args
    labels = None if image_labels is None or text_labels is None else (image_labels, text_labels)
    limits = None if row_limits is None or col_limits is None else (row_limits, col_limits)
    offset, exclude_self, normalize = options
    return Problem(image, text, scale, labels, offset, exclude_self, normalize, limits), backend


def flat(sides: Sides) -> tuple[Tensor, ...]:
    """Return the outputs of an op: each statistic of the rows, then of the columns. Exported programs rely on this."""
    rows, cols = sides
    return tuple(in_turn(rows.tensors(), cols.tensors()))


def by_side(
    tensors: Sequence[Any],
    kind: type[_Kind] = Side,  # type: ignore[assignment]
) -> tuple[_Kind, _Kind]:
    """Return rows and columns of the outputs of an op: the inverse of `flat`. `kind` is SideGrads for derivatives."""
    return kind(*tensors[0::2]), kind(*tensors[1::2])


def derivatives(stats: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the derivatives with respect to the statistics in `SideGrads`, with zeros in place of autograd's None."""
    return [torch.zeros_like(x) if d is None else d for x, d in zip(stats[: 2 * len(SideGrads._fields)], grads)]


@torch.library.impl("fastclip::contrastive_fwd", "default")
@without_autocast
def _fwd(*args: Any) -> tuple[Tensor, ...]:
    p, backend = problem_of(args)
    return flat(serving(backend, p).contrastive_fwd(p))


@torch.library.register_fake("fastclip::contrastive_fwd")
def _fwd_fake(*args: Any) -> tuple[Tensor, ...]:
    p, _ = problem_of(args)
    wide, dtype = reference.wide_dtype(p.image.device), torch.promote_types(p.image.dtype, torch.float32)

    def side(x: Tensor) -> Side:
        size = x.shape[0]
        neg, pos, pos_lse = (x.new_empty(n, dtype=wide) for n in (size, size, 0 if p.labels is None else size))
        return Side(neg, pos, pos_lse, x.new_empty(size, dtype=dtype))

    return flat((side(p.image), side(p.text)))


@torch.library.impl("fastclip::contrastive_maxima", "default")
@torch.no_grad()  # the op has no autograd formula, so autograd would record the operations that compute it
@without_autocast
def _maxima(*args: Any) -> tuple[Tensor, ...]:
    p, backend = problem_of(args)
    return flat(serving(backend, p).contrastive_fwd(p, maxima=True))


@torch.library.register_fake("fastclip::contrastive_maxima")
def _maxima_fake(*args: Any) -> tuple[Tensor, ...]:
    rows, cols = (
        side._replace(neg_top=torch.empty_like(side.neg), pos_top=torch.empty_like(side.pos))
        for side in by_side(_fwd_fake(*args))
    )
    return flat((rows, cols))


@torch.library.impl("fastclip::contrastive_bwd", "default")
@without_autocast
def _bwd(*args: Any) -> tuple[Tensor, ...]:
    *problem, stats, grads, needs = args
    p, backend = problem_of(problem)
    out = serving(backend, p).contrastive_bwd(p, by_side(stats), by_side(grads, SideGrads), needs)
    return tuple(p.image.new_empty(0) if d is None else d.contiguous() for d in out)


@torch.library.register_fake("fastclip::contrastive_bwd")
def _bwd_fake(image: Tensor, text: Tensor, scale: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *_, needs = args
    return tuple(x.new_empty(x.shape) if need else image.new_empty(0) for x, need in zip((image, text, scale), needs))


def _save_fwd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # an unused statistic has gradient None instead of zeros of its size
    keep(ctx, inputs, output)


def _fwd_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    args, stats = kept(ctx)
    needs = list(ctx.needs_input_grad[:3])
    upstream = derivatives(stats, grads)
    p, backend = problem_of(args)
    if needs_dense(backend, *upstream):
        with no_autocast(p.image.device):
            out = reference.contrastive_bwd(p, by_side(stats), by_side(upstream, SideGrads), needs)
    else:
        out = torch.ops.fastclip.contrastive_bwd(*args, list(stats), upstream, needs)
    return *(d if need else None for d, need in zip(out, needs)), *[None] * (len(args) - len(needs))


torch.library.register_autograd("fastclip::contrastive_fwd", _fwd_backward, setup_context=_save_fwd)


def _save_bwd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *problem, stats, grads, needs = inputs
    keep(ctx, problem, grads)
    ctx.stats, ctx.needs = len(stats), needs


def _bwd_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Compute second derivatives: both functions are run again on the reference, so that autograd can see into them."""
    args, upstream = kept(ctx)
    p, backend = problem_of(args)
    check_second_derivatives("contrastive_loss", backend, p.image)
    with torch.enable_grad(), no_autocast(p.image.device):
        # Views are differentiated in place of the arguments: the upstream gradients were computed from the features,
        # and the derivatives below must not include that path
        inputs = [x.view_as(x) for x in (p.image, p.text, p.scale, *upstream)]
        image, text, scale, *d_stats = inputs
        p = p._replace(image=image, text=text, scale=scale)
        stats = reference.contrastive_fwd(p)
        out = reference.contrastive_bwd(p, stats, by_side(d_stats, SideGrads), [True, True, True])
        second = vector_jacobian(out, [d if need else None for d, need in zip(grads, ctx.needs)], inputs)
    d_image, d_text, d_scale, *d_grads = second
    # `stats` get no gradient: they were recomputed from the features, so the gradient of the features includes the
    # contribution of the statistics
    return d_image, d_text, d_scale, *[None] * (len(args) - 3), [None] * ctx.stats, d_grads, None


torch.library.register_autograd("fastclip::contrastive_bwd", _bwd_backward, setup_context=_save_bwd)


def contrastive_statistics(p: Problem, backend: str | None = None) -> Sides:
    """Return differentiable statistics of the logits of image (M, D) and text (N, D): see `reference.contrastive_fwd`.

    The inverse norms carry no gradient.
    """
    if needs_dense(backend, p.image, p.text, p.scale):
        with no_autocast(p.image.device):
            rows, cols = reference.contrastive_fwd(p)
    else:
        rows, cols = by_side(torch.ops.fastclip.contrastive_fwd(*arguments(p, backend)))
    return rows._replace(inv_norm=rows.inv_norm.detach()), cols._replace(inv_norm=cols.inv_norm.detach())


def contrastive_maxima(p: Problem, backend: str | None = None) -> Sides:
    """Return the statistics of `contrastive_statistics` and the largest logits. No result has a gradient."""
    with torch.no_grad():
        if needs_dense(backend, p.image, p.text, p.scale):
            with no_autocast(p.image.device):
                return reference.contrastive_fwd(p, maxima=True)
        return by_side(torch.ops.fastclip.contrastive_maxima(*arguments(p, backend)))


def merge_logsumexp(partial: Tensor) -> Tensor:
    """Return the log-sum-exp (size,) of log-sum-exps (parts, size) of disjoint parts.

    If all parts are -inf, the result is -inf, with gradient 0.
    """
    top = partial.detach().amax(0)
    empty = top == -torch.inf
    top = torch.where(empty, 0.0, top)
    total = (partial - top).exp().sum(0)
    # The inner `where` keeps log away from 0: its infinite gradient there would become NaN in the outer `where`
    return torch.where(empty, -torch.inf, torch.where(empty, 1.0, total).log() + top)
