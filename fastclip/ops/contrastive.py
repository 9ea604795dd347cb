"""``fastclip::contrastive_fwd``, ``contrastive_bwd`` and ``contrastive_maxima`` as torch ops.

The forward returns statistics of z_ij = scale r_i c_j <image_i, text_j>; the loss is made of them in torch
(`fastclip/loss.py`), so torch's autograd supplies the derivatives by each statistic and the backward op turns them
into gradients of the features and the scale. `_backends/reference.py` states both functions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip._backends import reference, serving
from fastclip._backends.problem import Problem
from fastclip.ops.autocast import no_autocast, without_autocast
from fastclip.ops.second import check_second_derivatives, vector_jacobian
from fastclip.ops.transforms import needs_dense

__all__ = ["Statistics", "TopLogits", "contrastive_maxima", "contrastive_statistics", "merge_logsumexp"]

_PROBLEM = (
    "Tensor image, Tensor text, Tensor scale, Tensor? image_labels, Tensor? text_labels, SymInt offset, "
    "bool exclude_self, bool normalize, str? backend"
)

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
torch.library.define("fastclip::contrastive_fwd", f"({_PROBLEM}) -> ({', '.join(['Tensor'] * 8)})", tags=_TAGS)
torch.library.define(
    "fastclip::contrastive_bwd",
    f"({_PROBLEM}, Tensor[] stats, Tensor[] grads, bool[] needs) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define("fastclip::contrastive_maxima", f"({_PROBLEM}) -> ({', '.join(['Tensor'] * 12)})", tags=_TAGS)


class Statistics(NamedTuple):
    """What `fastclip::contrastive_fwd` returns; shapes in `reference.contrastive_fwd`."""

    row_neg: Tensor
    col_neg: Tensor
    row_pos: Tensor
    col_pos: Tensor
    row_pos_lse: Tensor
    col_pos_lse: Tensor
    image_inv_norm: Tensor
    text_inv_norm: Tensor


class TopLogits(NamedTuple):
    """Largest logit of every row (M,) and column (N,), over the negatives and over the positives; -inf without."""

    row_neg: Tensor
    col_neg: Tensor
    row_pos: Tensor
    col_pos: Tensor


_Labels = tuple[Tensor, Tensor] | None
_PROBLEM_SIZE = 9  # arguments of an op that are the problem


def _problem(args: tuple[Any, ...]) -> tuple[Problem, str | None]:
    """The first arguments of every op here -> the problem, and the backend's name."""
    image, text, scale, image_labels, text_labels, offset, exclude_self, normalize, backend = args
    labels = None if image_labels is None or text_labels is None else (image_labels, text_labels)
    return Problem(image, text, scale, labels, offset, exclude_self, normalize), backend


@torch.library.impl("fastclip::contrastive_fwd", "default")
@without_autocast
def _fwd(*args: Any) -> tuple[Tensor, ...]:
    p, backend = _problem(args)
    out: tuple[Tensor, ...] = serving(backend, p).contrastive_fwd(p)
    return out


@torch.library.register_fake("fastclip::contrastive_fwd")
def _fwd_fake(*args: Any) -> tuple[Tensor, ...]:
    p, _ = _problem(args)
    M, N = p.image.shape[0], p.text.shape[0]
    M_pos, N_pos = (0, 0) if p.labels is None else (M, N)
    wide, dtype = reference.wide_dtype(p.image.device), torch.promote_types(p.image.dtype, torch.float32)
    stats = (p.image.new_empty(size, dtype=wide) for size in (M, N, M, N, M_pos, N_pos))
    return *stats, *(p.image.new_empty(size, dtype=dtype) for size in (M, N))


@torch.library.impl("fastclip::contrastive_maxima", "default")
@torch.no_grad()  # nothing else keeps autograd from its insides
@without_autocast
def _maxima(*args: Any) -> tuple[Tensor, ...]:
    p, backend = _problem(args)
    out: tuple[Tensor, ...] = serving(backend, p).contrastive_fwd(p, maxima=True)
    return out


@torch.library.register_fake("fastclip::contrastive_maxima")
def _maxima_fake(*args: Any) -> tuple[Tensor, ...]:
    stats = _fwd_fake(*args)
    return *stats, *(torch.empty_like(x) for x in stats[:4])


@torch.library.impl("fastclip::contrastive_bwd", "default")
@without_autocast
def _bwd(*args: Any) -> tuple[Tensor, ...]:
    p, backend = _problem(args[:_PROBLEM_SIZE])
    out = serving(backend, p).contrastive_bwd(p, *args[_PROBLEM_SIZE:])
    return tuple(p.image.new_empty(0) if d is None else d.contiguous() for d in out)


@torch.library.register_fake("fastclip::contrastive_bwd")
def _bwd_fake(*args: Any) -> tuple[Tensor, ...]:
    p, _ = _problem(args[:_PROBLEM_SIZE])
    *_, needs = args
    inputs = p.image, p.text, p.scale
    return tuple(x.new_empty(x.shape) if need else p.image.new_empty(0) for x, need in zip(inputs, needs))


def _save_fwd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.options = inputs[5:]


def _fwd_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    problem, stats = saved[:5], saved[5:]
    needs = list(ctx.needs_input_grad[:3])
    upstream = [torch.zeros_like(x) if d is None else d for x, d in zip(stats[:6], grads)]
    if needs_dense(ctx.options[-1], *upstream):
        p, _ = _problem((*problem, *ctx.options))
        with no_autocast(p.image.device):
            out = reference.contrastive_bwd(p, list(stats), upstream, needs)
    else:
        out = torch.ops.fastclip.contrastive_bwd(*problem, *ctx.options, list(stats), upstream, needs)
    return *(d if need else None for d, need in zip(out, needs)), *[None] * (_PROBLEM_SIZE - 3)


torch.library.register_autograd("fastclip::contrastive_fwd", _fwd_backward, setup_context=_save_fwd)


def _save_bwd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *problem, stats, grads, needs = inputs
    ctx.save_for_backward(*problem[:5], *grads)
    ctx.options, ctx.stats, ctx.needs = problem[5:], len(stats), needs


def _bwd_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Second derivatives, on the reference: both functions again in torch, so that autograd sees through them."""
    image, text, scale, image_labels, text_labels, *upstream = ctx.saved_tensors
    check_second_derivatives("contrastive_loss", ctx.options[-1], image)
    with torch.enable_grad(), no_autocast(image.device):
        # Views, so that the derivatives below stop here: the upstream gradients depend on the features themselves
        inputs = [x.view_as(x) for x in (image, text, scale, *upstream)]
        p, _ = _problem((*inputs[:3], image_labels, text_labels, *ctx.options))
        stats = list(reference.contrastive_fwd(p))
        out = reference.contrastive_bwd(p, stats, inputs[3:], [True, True, True])
        second = vector_jacobian(out, [d if need else None for d, need in zip(grads, ctx.needs)], inputs)
    # `stats` get nothing: they were recomputed from the features above, so their part is in the features' gradient
    return *second[:3], *[None] * (_PROBLEM_SIZE - 3), [None] * ctx.stats, second[3:], None


torch.library.register_autograd("fastclip::contrastive_bwd", _bwd_backward, setup_context=_save_bwd)


@without_autocast
def _dense(image: Tensor, p: Problem, maxima: bool = False) -> tuple[Tensor, ...]:
    return reference.contrastive_fwd(p, maxima)


def contrastive_statistics(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    labels: _Labels = None,
    *,
    offset: int = 0,
    exclude_self: bool = False,
    normalize: bool = True,
    backend: str | None = None,
) -> Statistics:
    """Differentiable statistics of the logits of image (M, D) and text (N, D); see `reference.contrastive_fwd`.

    The inverse norms it returns carry no gradient.
    """
    if needs_dense(backend, image, text, scale):
        p = Problem(image, text, scale, labels, offset, exclude_self, normalize)
        *stats, r, c = _dense(image, p)
    else:
        *stats, r, c = torch.ops.fastclip.contrastive_fwd(
            image, text, scale, *(labels or (None, None)), offset, exclude_self, normalize, backend
        )
    stats += r.detach(), c.detach()
    return Statistics(*stats)


def contrastive_maxima(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    labels: _Labels = None,
    *,
    offset: int = 0,
    exclude_self: bool = False,
    normalize: bool = True,
    backend: str | None = None,
) -> tuple[Statistics, TopLogits]:
    """The same statistics and the largest logits with them, without gradient."""
    with torch.no_grad():
        if needs_dense(backend, image, text, scale):
            p = Problem(image, text, scale, labels, offset, exclude_self, normalize)
            out = _dense(image, p, maxima=True)
        else:
            out = torch.ops.fastclip.contrastive_maxima(
                image, text, scale, *(labels or (None, None)), offset, exclude_self, normalize, backend
            )
    return Statistics(*out[:8]), TopLogits(*out[8:])


def merge_logsumexp(partial: Tensor) -> Tensor:
    """log-sum-exp (size,) of the log-sum-exps (parts, size) of disjoint parts; -inf, with gradient 0, where all are."""
    top = partial.detach().amax(0)
    empty = top == -torch.inf
    top = torch.where(empty, 0.0, top)
    total = (partial - top).exp().sum(0)
    return torch.where(empty, -torch.inf, torch.where(empty, 1.0, total).log() + top)
