"""Row and column statistics of the logits, from which the losses are computed.

A tile stores partial sums for its rows and columns, and `contrastive_fwd_reduce` turns them into statistics. Both use
the same planes:

    0  log-sum-exp over the negatives
    1  log-sum-exp over the positives (with labels)
    2  sum of the positives' logits (with labels)
    3  largest negative (with MAXIMA, in plane 1 without labels)
    4  largest positive (with labels and MAXIMA)

Without labels the only positives are on the diagonal. They stay out of the sums, because the loss needs the difference
of the log-sum-exp and the positive, which cancels to 0 on a solved pair if the positive is part of the sum. Their
logits come from `features.norms` in fp64. docs/mathematics.md has the formulas.

M, N and D are the numbers of images, texts and features. i and j index images (rows) and texts (columns). c is the
number that is subtracted from every logit before the exponential (docs/mathematics.md), and c2 = log2(e) c. `offset` is
that of the diagonal: row i meets it in column i + offset.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from fastclip.triton_kernels.contrastive_fwd_reduce import REDUCED, contrastive_fwd_reduce_kernel
from fastclip.triton_kernels.features import Features, norms
from fastclip.triton_kernels.launch import FwdSide, LimitedSide, TileLaunch, Tiles, chunks, launch, limits2, panels_of
from fastclip.triton_kernels.tile import (
    INF,
    OFFSET2,
    REPAIR,
    dot_tile,
    exact_logits2,
    load_vector,
    needs_mask,
    on_diagonal,
    scaled,
    tile_at,
    tiles_of,
)
from torch import Tensor

from fastclip.system.rounding import ceil_div

__all__ = ["contrastive_fwd", "contrastive_fwd_kernel"]

_SMALLEST = tl.constexpr(2.0**-126)  # the smallest normal fp32 number


@triton.jit
def _sums(e, in_row, in_col):
    """Return the row sums of the exponentials where `in_row` is true, and the column sums where `in_col` is true."""
    return tl.sum(tl.where(in_row, e, 0.0), 1), tl.sum(tl.where(in_col, e, 0.0), 0)


@triton.jit
def _safe(top):
    """Return `top`, or 0 where it is -inf (an empty set), because -inf - -inf is NaN."""
    return tl.where(top == -INF, 0.0, top)


@triton.jit
def _exact_sums(z2, rest2, in_row, in_col):
    """Return log2 of the row and column sums in fp64, each from its own maximum, and these maxima."""
    row_z2, col_z2 = tl.where(in_row, z2, -INF), tl.where(in_col, z2, -INF)
    row_top, col_top = tl.max(row_z2, 1), tl.max(col_z2, 0)
    row_safe, col_safe = _safe(row_top), _safe(col_top)
    row = tl.log2(tl.sum(tl.exp2(row_z2 - row_safe[:, None] + rest2), 1))
    col = tl.log2(tl.sum(tl.exp2(col_z2 - col_safe[None, :] + rest2), 0))
    # tl.max ignores NaN and the sums do not: copy their NaN into the maxima
    row_top, col_top = tl.where(row != row, row, row_top), tl.where(col != col, col, col_top)
    return row_safe.to(tl.float64) + row, col_safe.to(tl.float64) + col, row_top, col_top


@triton.jit
def _store(row, col, plane: tl.constexpr, row_values, col_values, tile, CONFIG: tl.constexpr):
    """Store a tile's partial results of one plane: rows in (planes, tiles_n, M), columns in (planes, tiles_m, N)."""
    M, N = tile.M, tile.N
    i, j = tile.i0 + tl.arange(0, CONFIG.BLOCK_M), tile.j0 + tl.arange(0, CONFIG.BLOCK_N)
    tiles_m, tiles_n = tl.cdiv(M, CONFIG.BLOCK_M), tl.cdiv(N, CONFIG.BLOCK_N)
    tl.store(row.part + (plane * tiles_n + tile.n).to(tl.int64) * M + i, row_values, mask=i < M)
    tl.store(col.part + (plane * tiles_m + tile.m).to(tl.int64) * N + j, col_values, mask=j < N)


@triton.jit
def _statistics_tile(
    number, image, text, row, col, constants_ptr, M, N, D, offset,
    LABELS: tl.constexpr, EXCLUDE_SELF: tl.constexpr, EXACT: tl.constexpr, MAXIMA: tl.constexpr, CONFIG: tl.constexpr,
    LIMITS: tl.constexpr,
):  # fmt: skip
    tile = tile_at(number, M, N, offset, CONFIG)
    dot = dot_tile(image, text, tile, D, CONFIG)
    i0, j0 = tile.i0, tile.j0
    i, j = tl.arange(0, CONFIG.BLOCK_M), tl.arange(0, CONFIG.BLOCK_N)
    row_scale, row_rest = scaled(load_vector(row.factor, i0, i, M), constants_ptr)
    col_factor = load_vector(col.factor, j0, j, N)
    inside = j[None, :] < N - j0
    if EXACT:
        z2, rest2 = exact_logits2(dot, col_factor[None, :], row_scale, row_rest)
        inside = inside & (i < M - i0)[:, None]
    else:
        # The row's scale is multiplied in by the fma below, which rounds only once
        z2 = dot * col_factor[None, :]
        # An infinite c2 turns the exponentials of rows beyond M into 0 without a mask
        offset2 = tl.where(i < M - i0, tl.load(constants_ptr + OFFSET2), INF)
        e = tl.exp2(tl.fma(z2, tl.broadcast_to(row_scale[:, None], z2.shape), -offset2[:, None]))
        if LABELS or LIMITS:  # a term that flushed to 0 would look like an empty set, which requests no repair
            e = tl.maximum(e, tl.where(i < M - i0, _SMALLEST, 0.0)[:, None], propagate_nan=tl.PropagateNan.ALL)
    diagonal = on_diagonal(i, j, i0, j0, offset)
    if LABELS:
        row_label = load_vector(row.label, i0, i, M)
        col_label = load_vector(col.label, j0, j, N)
        same = row_label[:, None] == col_label[None, :]
        if EXCLUDE_SELF:
            inside = inside & (diagonal == 0)
        negative, positive = inside & (same == 0), inside & same
    else:
        negative = inside & (diagonal == 0)
    row_negative, col_negative = negative, negative
    if LIMITS:
        # Every kernel compares this product with the limits, so that all leave out the same pairs. NaN stays
        logit2 = z2 if EXACT else z2 * row_scale[:, None]
        row_negative = negative & ((logit2 > load_vector(row.limit, i0, i, M)[:, None]) == 0)
        col_negative = negative & ((logit2 > load_vector(col.limit, j0, j, N)[None, :]) == 0)
    if EXACT:
        row_sum, col_sum, row_top, col_top = _exact_sums(z2, rest2, row_negative, col_negative)
        _store(row, col, 0, row_sum, col_sum, tile, CONFIG)
        if MAXIMA:
            _store(row, col, 3 if LABELS else 1, row_top, col_top, tile, CONFIG)
    else:
        if LABELS or LIMITS:
            row_sum, col_sum = _sums(e, row_negative, col_negative)
        else:
            # Most tiles are away from the diagonal and the right edge, and skip the mask
            if needs_mask(i0, j0, N, offset, CONFIG.BLOCK_M, CONFIG.BLOCK_N):
                e = tl.where(negative, e, 0.0)
            row_sum, col_sum = tl.sum(e, 1), tl.sum(e, 0)
        _store(row, col, 0, row_sum, col_sum, tile, CONFIG)
    if LABELS:
        if EXACT:
            row_sum, col_sum, row_top, col_top = _exact_sums(z2, rest2, positive, positive)
            if MAXIMA:
                _store(row, col, 4, row_top, col_top, tile, CONFIG)
        else:
            row_sum, col_sum = _sums(e, positive, positive)
        _store(row, col, 1, row_sum, col_sum, tile, CONFIG)
        # Plane 2, the sum of the positives' logits. EXACT adds the rounding errors of the logits as well.
        if EXACT:
            rest2 = tl.where(positive, rest2, 0.0)
            row_sum, col_sum = tl.sum(rest2, 1).to(tl.float64), tl.sum(rest2, 0).to(tl.float64)
        else:
            positive = positive & (i < M - i0)[:, None]
            z2 *= row_scale[:, None]
            row_sum, col_sum = 0.0, 0.0
        z2 = tl.where(positive, z2, 0.0)
        _store(row, col, 2, row_sum + tl.sum(z2, 1), col_sum + tl.sum(z2, 0), tile, CONFIG)


@triton.jit(do_not_specialize=["M", "N", "offset"])
def contrastive_fwd_kernel(
    image,  # (M, D), a `Matrix` or a tensor descriptor
    text,  # (N, D)
    row,  # a `FwdSide`: factor (M,), label (M,), part (planes, tiles_n, M); EXACT: part fp64
    col,  # factor (N,), label (N,), part (planes, tiles_m, N)
    constants_ptr,  # SCALE and OFFSET2 (c2); an EXACT launch returns at once if REPAIR is 0
    M,
    N,
    D,
    offset,  # row i meets the diagonal in column i + offset
    LABELS: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    EXACT: tl.constexpr,
    MAXIMA: tl.constexpr,  # only if EXACT
    CONFIG: tl.constexpr,
    LIMITS: tl.constexpr = False,  # row and col are each a `LimitedSide`
):
    """Sums of exponentials along the rows and columns of every tile. The logits are never stored.

    Math      z2 = log2(e) s r_i c_j <image_i, text_j> and E = 2^(z2 - c2), one exponential per logit
              row_i = sum_j E_ij and col_j = sum_i E_ij of a tile, over its negatives and over its positives
              with LIMITS a pair above its row's limit is no negative of the row, and likewise for its column
              EXACT stores log2 of the same sums, from each row's and column's maximum, two exponentials per logit
    Program   one (BLOCK_M, BLOCK_N) tile, in groups of tile rows that reuse L2
              EXACT launches persistent programs that stride over the tiles
    Traffic   reads image once per tile column and text once per tile row
              writes 4 * planes * (M tiles_n + N tiles_m) bytes, twice that if EXACT
    Precision products in the input dtype, accumulation and exponentials in fp32, base 2
    Ragged    rows >= M and columns >= N are masked out of the sums, the D tail loads as 0
    Order     every tile stores its own partial sums, which the reduction adds in tile order: bitwise repeatable
    """
    if EXACT:
        if tl.load(constants_ptr + REPAIR) != 0:
            for number in range(tl.program_id(0), tiles_of(M, N, CONFIG), tl.num_programs(0)):
                _statistics_tile(
                    number, image, text, row, col, constants_ptr, M, N, D, offset,
                    LABELS, EXCLUDE_SELF, EXACT, MAXIMA, CONFIG, LIMITS,
                )  # fmt: skip
    else:
        _statistics_tile(
            tl.program_id(0), image, text, row, col, constants_ptr, M, N, D, offset,
            LABELS, EXCLUDE_SELF, EXACT, MAXIMA, CONFIG, LIMITS,
        )  # fmt: skip


def _side(factor: Tensor, label: Tensor | None, part: Tensor, limit: Tensor | None, k0: int, k1: int) -> Any:
    """Return the `FwdSide` of elements k0 to k1 - 1, or the `LimitedSide` if there are limits."""
    side = FwdSide(factor[k0:k1], None if label is None else label[k0:k1], part)
    return side if limit is None else LimitedSide(*side, limit[k0:k1])


def _statistics(
    rows: Features,
    cols: Features,
    labels: tuple[Tensor, Tensor] | None,
    limits: tuple[Tensor, Tensor] | None,
    constants: Tensor,
    offset: int,
    exclude_self: bool,
    maxima: bool,
    tiles: Tiles | None,
) -> tuple[Tensor, Tensor]:
    """Compute the statistics of the rows (planes, M) and of the columns (planes, N), fp64."""
    M, N, (x, y) = len(rows.x), len(cols.x), (rows.x, cols.x)
    has_labels, width = labels is not None, x.shape[1]
    row_label, col_label = labels or (None, None)
    row_limit, col_limit = limits or (None, None)
    flags = {"LABELS": has_labels, "EXCLUDE_SELF": exclude_self, "LIMITS": limits is not None}
    planes = 3 if has_labels else 1
    if maxima:
        planes += 2 if has_labels else 1
    tile = tiles.config("contrastive_fwd", M, N, has_labels) if tiles else None
    fast = TileLaunch(contrastive_fwd_kernel, x, width, {**flags, "EXACT": False, "MAXIMA": False}, tile)
    exact = TileLaunch(contrastive_fwd_kernel, x, width, {**flags, "EXACT": True, "MAXIMA": maxima})
    panel, tiles_n, tiles_m = panels_of((fast.tile, exact.tile), M, N, planes)
    row_out, col_out = (x.new_empty(planes, size, dtype=torch.float64) for size in (M, N))
    # A repair stores fp64 into the same memory, over the partial sums that it replaces
    row_part, col_part = (x.new_empty(planes * size, dtype=torch.float64) for size in (tiles_n * panel, tiles_m * N))
    # Only the EXACT variant computes the largest logits. The fast variant need not run if they are requested.
    for statistics in (exact,) if maxima else (fast, exact):
        repair = statistics is exact
        parts = (row_part, col_part) if repair else (row_part.view(torch.float32), col_part.view(torch.float32))
        col = _side(cols.factor, col_label, parts[1], col_limit, 0, N)
        for i0, i1 in chunks(M, panel):
            shape = i1 - i0, N
            row = _side(rows.factor, row_label, parts[0], row_limit, i0, i1)
            if tiles and not repair:
                tiles.contrastive_fwd(fast.tile, x[i0:i1], y, row, col, constants, offset + i0, exclude_self)
            else:
                arguments: tuple[Any, ...] = (
                    *statistics.operands(x[i0:i1], y),
                    row,
                    col,
                    constants,
                    *shape,
                    width,
                    offset + i0,
                )
                launch(statistics.kernel, statistics.programs(*shape), *arguments, **statistics.options)
            arguments = *parts, row_out[:, i0:], col_out, M, N, constants, *statistics.shape(*shape), *shape
            programs = ceil_div(i1 - i0, REDUCED) + ceil_div(N, REDUCED)
            arguments = *arguments, offset + i0, int(i0 == 0), int(i1 == M)
            options = {"LABELS": has_labels, "EXACT": repair, "MAXIMA": maxima, "BLOCK": REDUCED, "TILES": 8}
            options["LIMITS"] = limits is not None
            launch(contrastive_fwd_reduce_kernel, programs, *arguments, **options)
    return row_out, col_out


def contrastive_fwd(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    labels: tuple[Tensor, Tensor] | None,
    offset: int,
    exclude_self: bool,
    normalize: bool,
    limits: tuple[Tensor, Tensor] | None,
    maxima: bool = False,
    tiles: Tiles | None = None,
) -> tuple[Tensor, ...]:
    """Compute the row and column statistics of image (M, D) and text (N, D).

    Arguments and results are those of the reference's `contrastive_fwd`. It takes 2 M N D operations, without host
    synchronisation. One launch computes the norms (two if the features are not normalised). Then the rows are divided
    into panels, ranges of rows whose partial sums fit into the workspace, with two launches per panel: the tiles and
    their reduction. All logits share one c. Two more launches per panel repair the result with row and column maxima if
    terms of a sum flushed to zero under this c. Otherwise they return at once.

    tiles: kernels that compute the partial sums in place of `contrastive_fwd_kernel`, if there are no limits.
    """
    n = norms(image, text, scale, offset, normalize, labels is not None)
    if maxima:
        n.constants[REPAIR.value] = 1.0
    rows, cols = Features.of(image, n.row_inv, normalize), Features.of(text, n.col_inv, normalize)
    if labels is not None:
        labels = labels[0].int().contiguous(), labels[1].int().contiguous()
    planes = _statistics(rows, cols, labels, limits2(limits), n.constants, offset, exclude_self, maxima, tiles)
    # A custom op must not return tensors that share memory
    row, col = ([x.clone() for x in side] if len(side) > 1 else [side[0]] for side in planes)
    if labels is not None:
        stats = row[0], col[0], row[2], col[2], row[1], col[1], n.row_inv, n.col_inv
        return (*stats, row[3], col[3], row[4], col[4]) if maxima else stats
    empty = n.row_pos.new_empty(0)
    stats = row[0], col[0], n.row_pos, n.col_pos, empty, empty.clone(), n.row_inv, n.col_inv
    if not maxima:
        return stats
    return (
        *stats,
        row[1],
        col[1],
        _largest_positive(n.row_pos, offset, len(text)),
        _largest_positive(n.col_pos, -offset, len(image)),
    )


def _largest_positive(pos: Tensor, offset: int, size: int) -> Tensor:
    """Return the positives' logits, and -inf where row k has no partner k + offset in range(size)."""
    partner = torch.arange(len(pos), device=pos.device) + offset
    return torch.where((partner >= 0) & (partner < size), pos, -torch.inf)
