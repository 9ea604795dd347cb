"""Vectors of both sides, from which the tile kernels form the weights of the logits.

They are computed from the statistics of the forward pass and the loss's derivatives with respect to these statistics.
A row (or column) with the log-sum-exp lse, and the derivative d with respect to it, gives a logit z the weight
d exp(z - lse). The tile kernel computes exp(z - c) once for rows and columns. The other factor, d exp(c - lse), is
stored in a vector.

c is the number that is subtracted from every logit before the exponential (docs/mathematics.md). c2 = log2(e) c is the
constant OFFSET2, `offset2` in code. `offset` is that of the diagonal: row i meets it in column i + offset.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastclip.triton_kernels.features import NORMS, Features, bound_of, high_bit, largest_norm, set_constants
from fastclip.triton_kernels.gradients import DIAGONAL, store_factors
from fastclip.triton_kernels.launch import launch, limits2, matrix
from fastclip.triton_kernels.tile import CONSTANTS, GAIN, INF, LN2, LOG2E, REPAIR
from torch import Tensor

from fastclip.system.rounding import ceil_div

__all__ = [
    "LABEL",
    "LIMIT",
    "NEG",
    "NEG_EXACT",
    "NEG_LSE2",
    "POS",
    "POS_EXACT",
    "POS_LSE2",
    "gain_of",
    "guarded_weights",
    "largest_finite",
    "lowest_safe",
    "vectors",
]

# More planes of the vectors, after those of `gradients.py`. NEG: weight of the negatives for the shared c.
# NEG_EXACT and NEG_LSE2: weight and log2-sum-exp of the negatives for a repair. With labels, LABEL holds the labels (as
# int32 bits), POS, POS_EXACT and POS_LSE2 are the same for the positives, and DIAGONAL holds d_pos.
NEG, NEG_EXACT, NEG_LSE2 = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)
LABEL, POS, POS_EXACT, POS_LSE2 = tl.constexpr(7), tl.constexpr(8), tl.constexpr(9), tl.constexpr(10)
LIMIT = tl.constexpr(11)  # the limits, also without labels

_LOWEST = tl.constexpr(-62.0)  # a log-sum-exp further below c may have lost terms that flushed to zero
_BLOCK = 1024  # rows per program of the two kernels of this module


@triton.jit
def largest_finite(x, in_rows):
    """Return the magnitudes of `x`, and 0 for elements that are NaN, infinite or beyond the last row."""
    x = tl.abs(x)
    return tl.where(in_rows & (x < INF), x, 0.0)


@triton.jit
def _magnitude(x_ptr, k, in_rows):
    """Return the largest finite magnitude of elements k."""
    return tl.max(largest_finite(tl.load(x_ptr + k, mask=in_rows, other=0.0), in_rows), 0)


@triton.jit
def gain_of(largest):
    """Return the power of two that brings all weights into the range of float16, from the `largest` derivative (fp64).

    A mean loss over N pairs has derivatives of about 1 / N, which float16 would flush to zero. |G| is at most the sum
    of four derivatives. Each of them is below 2 h, where h = high_bit(largest) is the largest power of two that is not
    above `largest`, and both factors of fp16 features are below 2. With the gain 1024 / h a weight therefore stays
    below 2^15. A power of two changes no digit.
    """
    return 1024.0 / high_bit(tl.minimum(tl.maximum(largest, 1e-34), 1e34))


@triton.jit
def lowest_safe(offset2):
    """Return the log-sum-exp (fp64) below which the shared c may have lost terms."""
    return offset2.to(tl.float64) * LN2 + _LOWEST


class _Side(NamedTuple):
    """Inputs and vectors of one side of the problem. Statistics and derivatives are fp64."""

    neg: Tensor  # (size,)
    pos_lse: Tensor  # (size,), empty without labels
    d_neg: Tensor
    d_pos: Tensor
    d_pos_lse: Tensor
    inv: Tensor  # fp32
    factor: Tensor  # fp32
    label: Tensor | None  # int32; None without labels
    vec: Tensor  # (planes, size) fp32


@triton.jit
def _largest(
    x, side, top_ptr, largest_ptr, k0, size, D,
    NORMALIZE: tl.constexpr, LABELS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store the largest finite derivative of rows k0, k0 + 1, ... and, unless NORMALIZE, their largest norm."""
    k = k0 + tl.arange(0, BLOCK)
    in_rows = k < size
    largest = tl.maximum(_magnitude(side.d_neg, k, in_rows), _magnitude(side.d_pos, k, in_rows))
    if LABELS:
        largest = tl.maximum(largest, _magnitude(side.d_pos_lse, k, in_rows))
    tl.store(largest_ptr, largest)
    if not NORMALIZE:
        tl.store(top_ptr, largest_norm(x, side.inv, k, in_rows, D, BLOCK, BLOCK_D))


@triton.jit(do_not_specialize=["M", "N"])
def contrastive_bwd_largest_kernel(
    image,  # a `Matrix` (M, D)
    text,  # (N, D)
    row,  # a `_Side`
    col,
    top_ptr,  # (programs,) fp32; not written with NORMALIZE
    largest_ptr,  # (programs,) fp64
    constants_ptr,
    M,
    N,
    D,
    NORMALIZE: tl.constexpr,
    LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Largest finite derivative and, without NORMALIZE, largest norm of every BLOCK images or texts.

    This is a separate launch, because the gain and the bound must be known before the first vector is written.
    """
    block, blocks = tl.program_id(0), tl.cdiv(M, BLOCK)
    top_ptr, largest_ptr = top_ptr + block, largest_ptr + block
    if block < blocks:
        _largest(image, row, top_ptr, largest_ptr, block * BLOCK, M, D, NORMALIZE, LABELS, BLOCK, BLOCK_D)
    else:
        first = (block - blocks) * BLOCK
        _largest(text, col, top_ptr, largest_ptr, first, N, D, NORMALIZE, LABELS, BLOCK, BLOCK_D)
    if block == 0:
        tl.store(constants_ptr + REPAIR, 0.0)


@triton.jit
def guarded_weights(lse, d, offset2, lowest, constants_ptr, vec_ptrs, vec_plane, in_rows, PLANE: tl.constexpr):
    """Store three planes: the weight for the shared c, and weight and log2-sum-exp for a repair.

    lse, d: log-sum-exps and their derivatives times the gain, fp64. Sets REPAIR if a log-sum-exp is NaN, or is below
    `lowest` and has a derivative other than 0. Empty sets (-inf) request no repair.
    """
    lse2 = lse * LOG2E
    empty = lse == -INF
    wanted = in_rows & (empty == 0) & ((d != 0) | (lse != lse))
    if tl.max((wanted & ((lse >= lowest) == 0)).to(tl.int32), 0) != 0:
        tl.store(constants_ptr + REPAIR, 1.0)  # programs may race here, but all write the same value
    weight = d * tl.exp2(offset2.to(tl.float64) - lse2)
    tl.store(vec_ptrs + PLANE * vec_plane, tl.where(wanted, weight, 0.0).to(tl.float32), mask=in_rows)
    # The rounding error of the fp32 log-sum-exp is moved into the weight, so that their combination stays exact
    rounded = tl.where(empty, 0.0, lse2).to(tl.float32)
    lost = tl.where(tl.abs(rounded) < INF, rounded.to(tl.float64) - lse2, 0.0)
    exact = tl.where(wanted, d * tl.exp2(lost), 0.0)
    tl.store(vec_ptrs + (PLANE + 1) * vec_plane, exact.to(tl.float32), mask=in_rows)
    tl.store(vec_ptrs + (PLANE + 2) * vec_plane, rounded, mask=in_rows)


@triton.jit
def _vectors(
    side, other, constants_ptr, scale, offset2, gain, k0, size, other_size, offset,
    NORMALIZE: tl.constexpr, LABELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the vectors of rows k0, k0 + 1, ... of one side."""
    k = k0 + tl.arange(0, BLOCK)
    in_rows = k < size
    vec_ptrs = side.vec + k
    plane = size.to(tl.int64)
    inv = tl.load(side.inv + k, mask=in_rows, other=0.0)
    factor = tl.load(side.factor + k, mask=in_rows, other=1.0)
    out = scale.to(tl.float64) * (inv.to(tl.float64) / factor.to(tl.float64)) / gain
    store_factors(vec_ptrs, plane, inv, factor, out.to(tl.float32), in_rows, NORMALIZE)
    diagonal = tl.load(side.d_pos + k, mask=in_rows, other=0.0)
    d_neg = tl.load(side.d_neg + k, mask=in_rows, other=0.0) * gain
    lowest = lowest_safe(offset2)
    neg = tl.load(side.neg + k, mask=in_rows, other=0.0)
    guarded_weights(neg, d_neg, offset2, lowest, constants_ptr, vec_ptrs, plane, in_rows, NEG)
    if LABELS:
        label = tl.load(side.label + k, mask=in_rows, other=0)
        tl.store(vec_ptrs + LABEL * plane, label.to(tl.float32, bitcast=True), mask=in_rows)
        d_pos_lse = tl.load(side.d_pos_lse + k, mask=in_rows, other=0.0) * gain
        pos_lse = tl.load(side.pos_lse + k, mask=in_rows, other=0.0)
        guarded_weights(pos_lse, d_pos_lse, offset2, lowest, constants_ptr, vec_ptrs, plane, in_rows, POS)
    else:
        partner = k + offset
        has_partner = in_rows & (partner >= 0) & (partner < other_size)
        diagonal += tl.load(other.d_pos + partner, mask=has_partner, other=0.0)
    tl.store(vec_ptrs + DIAGONAL * plane, (diagonal * gain).to(tl.float32), mask=in_rows)


@triton.jit(do_not_specialize=["M", "N", "offset", "rows", "cols", "parts"])
def contrastive_bwd_vectors_kernel(
    row,
    col,
    top_ptr,  # (rows + cols,), one for each program of `contrastive_bwd_largest_kernel`
    largest_ptr,  # (rows + cols,)
    constants_ptr,
    scale_ptr,
    part_ptr,  # (parts,) fp32 partial sums of d_scale, set to 0: later kernels leave gaps between blocks
    M,
    N,
    offset,  # row i meets the diagonal in column i + offset
    rows,
    cols,
    parts,
    NORMALIZE: tl.constexpr,
    LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Vectors of both sides, from their statistics and derivatives.

    Math      weight_k = gain d_k exp(c - lse_k), and 0 for an empty set
              gain is a power of two with gain r_i |G_ij| c_j < 2^15 for fp16 features
              c as in the forward pass, so that the exponentials are the same and softmax weights sum to 1
    Program   BLOCK images or texts, every program computes the few constants again
    Traffic   reads the statistics and derivatives once, writes 7 planes of M + N words, 11 with LABELS
    Precision fp64, rounded to fp32 once
    Ragged    rows beyond the last are not written
    Order     one program computes a whole row: bitwise repeatable
    """
    scale = tl.load(scale_ptr).to(tl.float32)
    bound = bound_of(scale, top_ptr, rows, cols, NORMALIZE, BLOCK)
    offset2 = set_constants(constants_ptr, scale, bound, tl.program_id(0) == 0)
    largest = tl.zeros((BLOCK,), tl.float64)
    for b0 in range(0, rows + cols, BLOCK):
        b = b0 + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(largest_ptr + b, mask=b < rows + cols, other=0.0))
    gain = gain_of(tl.max(largest, 0))
    if tl.program_id(0) == 0:
        tl.store(constants_ptr + GAIN, gain.to(tl.float32))
    for p0 in range(tl.program_id(0) * BLOCK, parts, tl.num_programs(0) * BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        tl.store(part_ptr + p, 0.0, mask=p < parts)
    block, blocks = tl.program_id(0), tl.cdiv(M, BLOCK)
    if block < blocks:
        _vectors(
            row, col, constants_ptr, scale, offset2, gain, block * BLOCK, M, N, offset, NORMALIZE, LABELS, BLOCK
        )  # fmt: skip
    else:
        _vectors(
            col, row, constants_ptr, scale, offset2, gain, (block - blocks) * BLOCK, N, M, -offset,
            NORMALIZE, LABELS, BLOCK,
        )  # fmt: skip


def vectors(
    rows: Features,
    cols: Features,
    scale: Tensor,
    labels: tuple[Tensor, Tensor] | None,
    limits: tuple[Tensor, Tensor] | None,
    offset: int,
    normalize: bool,
    stats: list[Tensor],
    grads: list[Tensor],
    part: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the vectors of the rows (planes, M) and of the columns (planes, N), and the constants.

    rows, cols: features of images and texts. part: partial sums of d_scale, which are set to 0. The other arguments are
    those of `contrastive_bwd`.
    """
    has_labels = labels is not None
    M, N = len(rows.x), len(cols.x)
    row_neg, col_neg, _, _, row_pos_lse, col_pos_lse, row_inv, col_inv = (x.contiguous() for x in stats)
    d_row_neg, d_col_neg, d_row_pos, d_col_pos, d_row_pos_lse, d_col_pos_lse = (d.contiguous() for d in grads)
    row_label, col_label = (None, None) if labels is None else (x.int().contiguous() for x in labels)
    planes = LIMIT.value + 1 if limits is not None else 11 if has_labels else 7
    row_vec, col_vec = (rows.x.new_empty(planes, size, dtype=torch.float32) for size in (M, N))
    for vec, limit in zip((row_vec, col_vec), limits2(limits) or ()):
        vec[LIMIT.value].copy_(limit)
    row = _Side(row_neg, row_pos_lse, d_row_neg, d_row_pos, d_row_pos_lse, row_inv, rows.factor, row_label, row_vec)
    col = _Side(col_neg, col_pos_lse, d_col_neg, d_col_pos, d_col_pos_lse, col_inv, cols.factor, col_label, col_vec)
    block = _BLOCK if normalize else NORMS["BLOCK"]
    counts = ceil_div(M, block), ceil_div(N, block)
    top, constants = (rows.x.new_empty(n, dtype=torch.float32) for n in (sum(counts), CONSTANTS))
    largest = rows.x.new_empty(sum(counts), dtype=torch.float64)
    flags = {"NORMALIZE": normalize, "LABELS": has_labels}
    launch(
        contrastive_bwd_largest_kernel,
        sum(counts),
        *(matrix(rows.x), matrix(cols.x), row, col, top, largest, constants, M, N, rows.x.shape[1]),
        **flags,
        BLOCK=block,
        BLOCK_D=NORMS["BLOCK_D"],
    )
    launch(
        contrastive_bwd_vectors_kernel,
        ceil_div(M, _BLOCK) + ceil_div(N, _BLOCK),
        *(row, col, top, largest, constants, scale, part, M, N, offset, *counts, len(part)),
        **flags,
        BLOCK=_BLOCK,
    )
    return row_vec, col_vec, constants
