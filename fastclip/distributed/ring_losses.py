"""The losses over the ring (`ring.py`) as torch ops. They apply `fastclip.ops` to one block of texts at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastclip._backends import reference
from fastclip._backends.problem import Problem, Side, SideGrads, Sides, in_turn
from fastclip.distributed.ring import Ring, Sums
from fastclip.ops import merge_logsumexp
from fastclip.ops.backward import TAGS, keep, kept
from fastclip.ops.contrastive import PROBLEM, arguments, by_side, derivatives, flat, problem_of
from fastclip.ops.sigmoid import PAIRS, Pairs, pairs_of

__all__ = ["ring_sigmoid_pairs", "ring_statistics"]

_RING = "SymInt[] sizes, str group"  # number of texts on every rank, and the name of the group
torch.library.define("fastclip::ring_fwd", f"({PROBLEM}, {_RING}) -> ({', '.join(['Tensor'] * 8)})", tags=TAGS)
torch.library.define(
    "fastclip::ring_bwd",
    f"({PROBLEM}, {_RING}, Tensor[] stats, Tensor[] grads, bool[] needs) -> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)


def _block_problem(ring: Ring, owner: int, block: Tensor, p: Problem) -> Problem:
    """Return the problem of this rank's images and the texts of `owner`."""
    columns = ring.columns(owner)
    labels, limits = (None if x is None else (x[0], x[1][columns]) for x in (p.labels, p.limits))
    return p._replace(text=block, labels=labels, limits=limits, offset=ring.offset(owner))


@torch.library.impl("fastclip::ring_fwd", "default")
def _fwd(*args: Any) -> tuple[Tensor, ...]:
    """Compute `fastclip::contrastive_fwd` of this rank's images and the texts of all ranks."""
    *problem, sizes, group = args
    p, backend = problem_of(problem)
    ring = Ring(sizes, group)
    ring.open(p.text)
    # By owner, not in order of arrival, which differs from rank to rank: rows are then merged in rank order
    stats: list[Any] = [None] * ring.ranks
    for owner, block in ring.blocks(p.text):
        of_block = _block_problem(ring, owner, block, p)
        stats[owner] = by_side(torch.ops.fastclip.contrastive_fwd(*arguments(of_block, backend)))
        del block, of_block  # freed before the next block is computed
    row_parts, col_parts = zip(*stats)
    neg, pos, pos_lse = (torch.stack(x) for x in zip(*((rows.neg, rows.pos, rows.pos_lse) for rows in row_parts)))
    rows = Side(merge_logsumexp(neg), pos.sum(0), merge_logsumexp(pos_lse), row_parts[ring.rank].inv_norm)
    cols = Side(*(torch.cat(x) for x in zip(*(cols.tensors() for cols in col_parts))))
    return flat((rows, cols))


@torch.library.register_fake("fastclip::ring_fwd")
def _fwd_fake(*args: Any) -> tuple[Tensor, ...]:
    *problem, sizes, _ = args
    p, backend = problem_of(problem)
    texts = p.text.new_empty(sum(sizes), p.text.shape[1])
    return torch.ops.fastclip.contrastive_fwd(*arguments(p._replace(text=texts), backend))


@torch.library.impl("fastclip::ring_bwd", "default")
def _bwd(*args: Any) -> tuple[Tensor, ...]:
    *problem, sizes, group, stats, grads, needs = args
    p, backend = problem_of(problem)
    rows, cols = by_side(stats)
    d_rows, d_cols = by_side(grads, SideGrads)
    ring = Ring(sizes, group)
    sums = Sums(ring)
    wide = torch.promote_types(p.text.dtype, torch.float32)
    # Summed in fp32, because a 16-bit sum would be rounded once per block
    d_image = torch.zeros_like(p.image, dtype=wide) if needs[0] else None
    d_scale = torch.zeros_like(p.scale)
    for owner, block in ring.blocks(p.text):
        columns = ring.columns(owner)
        cols_here, d_cols_here = ([x[columns] if len(x) else x for x in side] for side in (cols.tensors(), d_cols))
        # The CPU backend recognises its forward pass by the address of inv_norm, and would reuse the dot products of
        # the last block, which had other texts. A copy has another address.
        rows_here = rows._replace(inv_norm=rows.inv_norm.clone()).tensors()
        stats_here, grads_here = in_turn(rows_here, cols_here), in_turn(d_rows, d_cols_here)
        of_block = arguments(_block_problem(ring, owner, block, p), backend)
        shares = torch.ops.fastclip.contrastive_bwd(*of_block, stats_here, grads_here, needs)
        if d_image is not None:
            d_image += shares[0]
        if needs[1]:
            sums.add(shares[1].to(wide))
        if needs[2]:
            d_scale += shares[2]
        del block, of_block, shares
    nothing = p.image.new_empty(0)
    return (
        nothing if d_image is None else d_image.to(p.image.dtype),
        sums.of_own_texts().to(p.text.dtype) if needs[1] else nothing.clone(),
        d_scale if needs[2] else nothing.clone(),
    )


@torch.library.register_fake("fastclip::ring_bwd")
def _bwd_fake(image: Tensor, text: Tensor, scale: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *_, needs = args
    return tuple(x.new_empty(x.shape) if need else image.new_empty(0) for x, need in zip((image, text, scale), needs))


def _save_fwd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    keep(ctx, inputs, output)


def _fwd_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    args, stats = kept(ctx)
    needs = list(ctx.needs_input_grad[:3])
    out = torch.ops.fastclip.ring_bwd(*args, list(stats), derivatives(stats, grads), needs)
    return *(d if need else None for d, need in zip(out, needs)), *[None] * (len(args) - len(needs))


torch.library.register_autograd("fastclip::ring_fwd", _fwd_backward, setup_context=_save_fwd)


def ring_statistics(p: Problem, backend: str | None, sizes: Sequence[int], group: str) -> Sides:
    """Return `contrastive_statistics` of this rank's images and the texts of all ranks.

    sizes: number of texts on every rank. `p.labels[1]` and `p.limits[1]` are those of all texts. The gradient of
    `p.text` is summed over all ranks.
    """
    rows, cols = by_side(torch.ops.fastclip.ring_fwd(*arguments(p, backend), sizes, group))
    return rows._replace(inv_norm=rows.inv_norm.detach()), cols._replace(inv_norm=cols.inv_norm.detach())


torch.library.define("fastclip::ring_sigmoid_fwd", f"({PAIRS}, {_RING}) -> ({', '.join(['Tensor'] * 5)})", tags=TAGS)


@torch.library.impl("fastclip::ring_sigmoid_fwd", "default")
def _sigmoid_fwd(*args: Any) -> tuple[Tensor, ...]:
    """Compute `fastclip::sigmoid_fwd` of this rank's images and all texts. d_text (N, D) is for this rank's texts."""
    *of_pairs, sizes, group = args
    pairs = Pairs(*of_pairs)
    image, needs = pairs.image, pairs.needs
    ring = Ring(sizes, group)
    ring.open(pairs.text)
    sums = Sums(ring)
    totals: list[Tensor] = []
    for owner, block in ring.blocks(pairs.text):
        of_block = _block_problem(ring, owner, block, pairs.problem())
        shares = torch.ops.fastclip.sigmoid_fwd(*pairs_of(of_block, pairs.bias, pairs.divisor, pairs.backend, needs))
        loss, d_image, d_text, d_scale, d_bias = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in shares)
        if needs[1]:
            sums.add(d_text)
        others = [loss, d_image, d_scale, d_bias]
        totals = [total + share for total, share in zip(totals, others)] if totals else others
        del block, of_block, shares, d_image, d_text, others
    loss, d_image, d_scale, d_bias = totals
    dtype = reference.saved_dtype(image)
    d_text = sums.of_own_texts().to(dtype) if needs[1] else image
    grads = d_image.to(dtype), d_text, d_scale, d_bias
    return loss, *(d if need else image.new_empty(0) for d, need in zip(grads, needs))


@torch.library.register_fake("fastclip::ring_sigmoid_fwd")
def _sigmoid_fwd_fake(*args: Any) -> tuple[Tensor, ...]:
    *of_pairs, _, _ = args
    return torch.ops.fastclip.sigmoid_fwd(*of_pairs)


torch.library.define(
    "fastclip::ring_sigmoid_bwd",
    f"({PAIRS}, Tensor[] kept, Tensor d_loss) -> ({', '.join(['Tensor'] * 4)})",
    tags=TAGS,
)


def _sigmoid_bwd(*args: Any) -> tuple[Tensor, ...]:
    """Call `fastclip::sigmoid_bwd`, but without its second derivatives, which would cover this rank's texts alone."""
    return torch.ops.fastclip.sigmoid_bwd(*args)


torch.library.impl("fastclip::ring_sigmoid_bwd", "default", _sigmoid_bwd)
torch.library.register_fake("fastclip::ring_sigmoid_bwd", _sigmoid_bwd)


def _save_sigmoid(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *grads = output
    keep(ctx, inputs, grads)
    ctx.mark_non_differentiable(*grads)


def _sigmoid_backward(ctx: Any, d_loss: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    args, grads = kept(ctx)
    *of_pairs, _, _ = args
    pairs = Pairs(*of_pairs)._replace(needs=list(ctx.needs_input_grad[:4]))
    out = torch.ops.fastclip.ring_sigmoid_bwd(*pairs, list(grads), d_loss)
    return *(d if need else None for d, need in zip(out, pairs.needs)), *[None] * (len(args) - 4)


torch.library.register_autograd("fastclip::ring_sigmoid_fwd", _sigmoid_backward, setup_context=_save_sigmoid)


def _no_second(ctx: Any, *grads: Tensor | None) -> Any:
    raise RuntimeError(
        "comm='ring' has no second derivatives (the loss was differentiated with create_graph=True); "
        "pass comm='gather' and backend='reference'"
    )


for _name in ("ring_bwd", "ring_sigmoid_bwd"):
    torch.library.register_autograd(f"fastclip::{_name}", _no_second, setup_context=lambda ctx, inputs, output: None)


def ring_sigmoid_pairs(
    p: Problem, bias: Tensor, *, divisor: int, backend: str | None, sizes: Sequence[int], group: str
) -> Tensor:
    """Return `sigmoid_pairs` of this rank's images and the texts of all ranks (see `ring_statistics`)."""
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (*p[:3], bias)]
    pairs = pairs_of(p, bias, divisor, backend, needs)
    loss: Tensor = torch.ops.fastclip.ring_sigmoid_fwd(*pairs, sizes, group)[0]
    return loss
