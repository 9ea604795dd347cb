"""Reduction of the tiles' partial results to log-sum-exps, sums and largest logits, in a fixed order.

The tile kernel stores its partial sums instead of adding them with float atomics, whose order changes from run to run.
The planes are those of `contrastive_fwd.py`.

c is the number that is subtracted from every logit z before the exponential (docs/mathematics.md). log2(e) c is the
constant OFFSET2. `offset` is that of the diagonal: row i meets it in column i + offset.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from fastclip.triton_kernels.tile import INF, LN2, OFFSET2, REPAIR

__all__ = ["REDUCED", "contrastive_fwd_reduce_kernel", "reduce_plane"]

_SAFE_SUM = tl.constexpr(math.exp(-62))  # a smaller sum of exp(z - c) may have lost terms that flushed to zero
REDUCED = 128  # rows or columns per program of the reduction


@triton.jit
def reduce_plane(
    part_ptr, before, constants_ptr, tiles, size, k, alone, first, last, EMPTY: tl.constexpr, EXACT: tl.constexpr,
    IS_SUM: tl.constexpr, IS_TOP: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Reduce elements k of one side's partial results (tiles, size), merge in the earlier result `before`; return fp64.

    A column's partial results come panel by panel of rows: `before` is the result of the panels so far, and the `first`
    panel has none. On the `last` panel the result is finished: its logarithm is taken, c is added, and units of log 2
    become natural units. k = `alone` is an element whose only pair is on the diagonal, so that its set of negatives is
    empty. With EMPTY any set may be empty.
    """
    in_rows = k < size
    top = tl.where(in_rows & (first != 0), -INF, before) if EXACT and not IS_SUM else before
    total, lost = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.int32)
    lost += (before != before).to(tl.int32)
    ptrs = part_ptr + k[None, :]
    if EXACT and not IS_SUM:
        # The parts are log2 of sums (or largest logits): find the largest first, and look for NaN, which tl.max ignores
        for t0 in range(0, tiles, TILES):
            t = t0 + tl.arange(0, TILES)[:, None]
            part = tl.load(ptrs + t.to(tl.int64) * size, mask=in_rows[None, :] & (t < tiles), other=-INF)
            top = tl.maximum(top, tl.max(part, 0).to(tl.float64))
            lost |= tl.max((part != part).to(tl.int32), 0)
    if not IS_TOP:
        safe = tl.where(top == -INF, 0.0, top)  # an empty set has top = -inf, and -inf - -inf is NaN
        for t0 in range(0, tiles, TILES):
            t = t0 + tl.arange(0, TILES)[:, None]
            mask = in_rows[None, :] & (t < tiles)
            if EXACT and not IS_SUM:
                part = tl.load(ptrs + t.to(tl.int64) * size, mask=mask, other=-INF)
                total += tl.sum(tl.exp2(part.to(tl.float64) - safe[None, :]), 0)
            else:
                total += tl.sum(tl.load(ptrs + t.to(tl.int64) * size, mask=mask, other=0.0).to(tl.float64), 0)
        if EXACT and not IS_SUM:
            total = tl.log2(total + tl.exp2(before - safe)) + safe
        else:
            total += before
    if IS_TOP:
        total = tl.where(lost != 0, float("nan"), top)
    if last != 0:
        if not EXACT and not IS_SUM:
            # A sum of 0 comes from an empty set, which is right, or from terms that all flushed, which need a repair.
            # With EMPTY the tile kernel keeps every term above 0. Without it only `alone` has an empty set.
            empty = (total == 0) if EMPTY else (k == alone)
            if tl.max((in_rows & (empty == 0) & ((total >= _SAFE_SUM) == 0)).to(tl.int32), 0) != 0:
                tl.store(constants_ptr + REPAIR, 1.0)  # programs may race here, but all write the same value
            total = tl.log2(total) + tl.load(constants_ptr + OFFSET2).to(tl.float64)
        total = total * LN2
    return total


@triton.jit
def _reduce(
    part_ptr, out_ptr, out_plane, constants_ptr, tiles, size, k0, alone, first, last,
    LABELS: tl.constexpr, EXACT: tl.constexpr, MAXIMA: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
    LIMITS: tl.constexpr,
):  # fmt: skip
    """Reduce BLOCK elements of one side, from k0 on: (planes, tiles, size) -> out (planes, out_plane), fp64."""
    k = k0 + tl.arange(0, BLOCK)
    in_rows = k < size
    for plane in tl.static_range((3 if LABELS else 1) + ((2 if LABELS else 1) if MAXIMA else 0)):
        is_sum, is_top = LABELS and plane == 2, plane >= (3 if LABELS else 1)
        out_ptrs = out_ptr + plane * out_plane + k
        before = tl.load(out_ptrs, mask=in_rows & (first == 0), other=0.0 if is_sum or not EXACT else -INF)
        total = reduce_plane(
            part_ptr + plane * tiles.to(tl.int64) * size, before, constants_ptr, tiles, size, k, alone, first, last,
            LABELS or LIMITS, EXACT, is_sum, is_top, BLOCK, TILES,
        )  # fmt: skip
        tl.store(out_ptrs, total, mask=in_rows)


@triton.jit(
    do_not_specialize=["tiles_m", "tiles_n", "M", "N", "row_out_plane", "col_out_plane", "offset", "first", "last"]
)
def contrastive_fwd_reduce_kernel(
    row_part_ptr,  # (planes, tiles_n, M) fp32, EXACT fp64
    col_part_ptr,  # (planes, tiles_m, N) fp32, EXACT fp64
    row_out_ptr,  # (planes, row_out_plane) fp64
    col_out_ptr,  # (planes, col_out_plane) fp64
    row_out_plane,
    col_out_plane,
    constants_ptr,
    tiles_m,
    tiles_n,
    M,
    N,
    offset,  # row i meets the diagonal in column i + offset
    first,  # 1 on the first panel of rows, when the columns have no earlier result to add to
    last,  # 1 on the last panel, when the columns become complete
    LABELS: tl.constexpr,
    EXACT: tl.constexpr,
    MAXIMA: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    LIMITS: tl.constexpr = False,
):
    """Log-sum-exps of rows and columns from the partial sums of a panel of rows. Sets REPAIR if a sum is too small.

    Math      row_i = c + log(sum of the tiles' parts)
              EXACT merges parts that are log2 of the tiles' sums, without c
    Program   BLOCK rows, and after them BLOCK columns
    Traffic   reads every partial sum once, twice if EXACT
    Precision fp64, and sums of exp(z - c) below e^-62 request a repair, because terms of them may have flushed
    Ragged    rows and columns beyond M and N are not read
    Order     tiles and panels from first to last: bitwise repeatable
    """
    block, blocks = tl.program_id(0), tl.cdiv(M, BLOCK)
    wanted = True
    if EXACT:
        wanted = tl.load(constants_ptr + REPAIR) != 0
    if wanted:
        if block < blocks:
            alone = tl.where(N == 1, -offset, -1)
            _reduce(
                row_part_ptr, row_out_ptr, row_out_plane, constants_ptr, tiles_n, M, block * BLOCK, alone, 1, 1,
                LABELS, EXACT, MAXIMA, BLOCK, TILES, LIMITS,
            )  # fmt: skip
        else:
            alone = tl.where((M == 1) & (first != 0) & (last != 0), offset, -1)
            _reduce(
                col_part_ptr, col_out_ptr, col_out_plane, constants_ptr, tiles_m, N, (block - blocks) * BLOCK, alone,
                first, last, LABELS, EXACT, MAXIMA, BLOCK, TILES, LIMITS,
            )  # fmt: skip
