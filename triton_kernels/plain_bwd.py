"""Finish kernel of the plain case's backward.

The forward has computed the vectors for an upstream gradient of 1. The finish multiplies by the true one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastclip.triton_kernels.gradients import finish_rows, in_two, total_of
from fastclip.triton_kernels.plain_fwd import DIAGONAL_SHARE, plane_of
from fastclip.triton_kernels.tile import GAIN, REPAIR, SCALE

__all__ = ["plain_finish_kernel"]


@triton.jit
def _scale_gradient(part_ptr, fast_parts, exact_parts, constants_ptr, out_ptr, factor, BLOCK: tl.constexpr):
    """Store d_scale: the partial sums of the tiles plus the diagonal pairs' part, times `factor`, in fp64.

    The fast kernel and the repair have different numbers of tiles, and only one of them has stored its sums.
    """
    parts = fast_parts
    if tl.load(constants_ptr + REPAIR) != 0:
        parts = exact_parts
    total = total_of(part_ptr, 0, parts, BLOCK) + tl.load(constants_ptr + DIAGONAL_SHARE).to(tl.float64)
    tl.store(out_ptr, (total * factor).to(tl.float32))


@triton.jit(do_not_specialize=["upstream_ptr", "fast_parts", "exact_parts", "i0", "rows", "N"])
def plain_finish_kernel(
    row,  # a `FinishSide`, whose raw (rows, ...) starts at image i0
    col,  # a `FinishSide` of all texts
    constants_ptr,
    upstream_ptr,  # () fp32: the upstream gradient
    part_ptr,  # (parts,) fp32: the tiles' partial sums of d_scale; read with D_SCALE
    d_scale_ptr,  # () fp32; written with D_SCALE
    fast_parts,  # number of partial sums without a repair
    exact_parts,  # number of partial sums after a repair
    i0,
    rows,
    N,
    D,
    D_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Gradients of the features from the products, and of the scale, times the upstream gradient.

    Math      g_k = raw_k + DIAGONAL_k FACTOR_k FACTOR_k' other_k with the factor FACTOR_k' of the other side
              out_k = upstream s OUT_k (g_k - x_k <x_k, g_k> / <x_k, x_k>) / gain, see `finish_kernel`
              d_scale = upstream (sum over tiles + sum over diagonal pairs) / gain
    Program   BLOCK of `rows` images, and after them BLOCK of all texts, in two passes over D
              with D_SCALE one more program, the first, adds up d_scale
    Traffic   reads raw, x and other twice, writes out once
    Precision fp32, d_scale in fp64
              upstream and gain are combined before the only rounding, so a loss scaler's factor prevents flushing
    Ragged    rows beyond the last and the D tail load as 0
    Order     one program computes a whole row: bitwise repeatable
              d_scale needs no ticket, because earlier launches have stored all of its partial sums
    """
    upstream = tl.load(upstream_ptr).to(tl.float64) / tl.load(constants_ptr + GAIN).to(tl.float64)
    factor, power = in_two(upstream * tl.load(constants_ptr + SCALE).to(tl.float64))
    block, blocks = tl.program_id(0), tl.cdiv(rows, BLOCK)
    if D_SCALE:
        block -= 1
    plane = plane_of(N)
    if block < 0:
        _scale_gradient(part_ptr, fast_parts, exact_parts, constants_ptr, d_scale_ptr, upstream, PARTS)
    elif block < blocks:
        finish_rows(
            row, col, i0, block * BLOCK, rows, plane, plane, D, 0, 1.0, factor, power, True, True, BLOCK, BLOCK_D
        )  # fmt: skip
    else:
        first = (block - blocks) * BLOCK
        finish_rows(col, row, 0, first, N, plane, plane, D, 0, 1.0, factor, power, True, True, BLOCK, BLOCK_D)
