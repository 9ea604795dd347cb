"""Row and column statistics of the logits.

Planes of partial sums, and of what they are reduced to: the log-sum-exp over the negatives; with labels that over the
positives and the positives' sum; with MAXIMA the largest negative, and with labels the largest positive.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from fastclip.triton_kernels.contrastive_fwd_reduce import REDUCED, contrastive_fwd_reduce_kernel
from fastclip.triton_kernels.features import Features, norms
from fastclip.triton_kernels.launch import FwdSide, TileLaunch, Tiles, chunks, launch, panels_of
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

_SMALLEST = tl.constexpr(2.0**-126)


@triton.jit
def _sums(e, keep):
    """Row sums and column sums of the kept exponentials."""
    e = tl.where(keep, e, 0.0)
    return tl.sum(e, 1), tl.sum(e, 0)


@triton.jit
def _safe(top):
    """`top`, or 0 where it is -inf: the exponent of nothing."""
    return tl.where(top == -INF, 0.0, top)


@triton.jit
def _exact_sums(z2, rest2, keep):
    """log2 of the same sums without an offset, fp64, from the largest of every row and column; and those."""
    z2 = tl.where(keep, z2, -INF)
    row_top, col_top = tl.max(z2, 1), tl.max(z2, 0)
    row_safe, col_safe = _safe(row_top), _safe(col_top)
    row = tl.log2(tl.sum(tl.exp2(z2 - row_safe[:, None] + rest2), 1))
    col = tl.log2(tl.sum(tl.exp2(z2 - col_safe[None, :] + rest2), 0))
    # tl.max passes over NaN, the sums do not
    row_top, col_top = tl.where(row != row, row, row_top), tl.where(col != col, col, col_top)
    return row_safe.to(tl.float64) + row, col_safe.to(tl.float64) + col, row_top, col_top


@triton.jit
def _store(row, col, plane: tl.constexpr, row_values, col_values, tile, CONFIG: tl.constexpr):
    """Stores partial results of a tile: rows in [planes, tiles_n, M], columns in [planes, tiles_m, N]."""
    M, N = tile.M, tile.N
    i, j = tile.i0 + tl.arange(0, CONFIG.BLOCK_M), tile.j0 + tl.arange(0, CONFIG.BLOCK_N)
    tiles_m, tiles_n = tl.cdiv(M, CONFIG.BLOCK_M), tl.cdiv(N, CONFIG.BLOCK_N)
    tl.store(row.part + (plane * tiles_n + tile.n).to(tl.int64) * M + i, row_values, mask=i < M)
    tl.store(col.part + (plane * tiles_m + tile.m).to(tl.int64) * N + j, col_values, mask=j < N)


@triton.jit
def _statistics_tile(
    number, image, text, row, col, constants_ptr, M, N, D, offset,
    LABELS: tl.constexpr, EXCLUDE_SELF: tl.constexpr, EXACT: tl.constexpr, MAXIMA: tl.constexpr, CONFIG: tl.constexpr,
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
        z2 = dot * col_factor[None, :]
        # an infinite offset takes the rows beyond M out of the sums, for nothing
        offset2 = tl.where(i < M - i0, tl.load(constants_ptr + OFFSET2), INF)
        e = tl.exp2(tl.fma(z2, tl.broadcast_to(row_scale[:, None], z2.shape), -offset2[:, None]))
        if LABELS:  # what flushes to zero must not look like an empty set
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
    if EXACT:
        row_sum, col_sum, row_top, col_top = _exact_sums(z2, rest2, negative)
        _store(row, col, 0, row_sum, col_sum, tile, CONFIG)
        if MAXIMA:
            _store(row, col, 3 if LABELS else 1, row_top, col_top, tile, CONFIG)
    else:
        if LABELS:
            row_sum, col_sum = _sums(e, negative)
        else:
            if needs_mask(i0, j0, N, offset, CONFIG.BLOCK_M, CONFIG.BLOCK_N):
                e = tl.where(negative, e, 0.0)
            row_sum, col_sum = tl.sum(e, 1), tl.sum(e, 0)
        _store(row, col, 0, row_sum, col_sum, tile, CONFIG)
    if LABELS:
        if EXACT:
            row_sum, col_sum, row_top, col_top = _exact_sums(z2, rest2, positive)
            if MAXIMA:
                _store(row, col, 4, row_top, col_top, tile, CONFIG)
        else:
            row_sum, col_sum = _sums(e, positive)
        _store(row, col, 1, row_sum, col_sum, tile, CONFIG)
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
    constants_ptr,  # SCALE, OFFSET2, ...; EXACT: returns at once where REPAIR is 0
    M,
    N,
    D,
    offset,  # row i's own column is i + offset
    LABELS: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    EXACT: tl.constexpr,
    MAXIMA: tl.constexpr,  # with EXACT
    CONFIG: tl.constexpr,
):
    """Sums of one exponential a logit, of every tile's rows and columns; the logits are never stored.

    Math      row_i += sum_j 2^(z2_ij - offset2), col_j += sum_i of the same, over negatives and over positives;
              z2 = log2(e) s r_i c_j <image_i, text_j>. EXACT, where one offset cannot serve all logits: log2 of the
              sums, from each tile's own maxima, by two exponentials a logit
    Program   one (BLOCK_M, BLOCK_N) tile, in groups of tile rows that reuse L2; EXACT: persistent, tiles in steps of
              the grid
    Traffic   reads image and text once per tile column and row; writes 4 planes (M tiles_n + N tiles_m) bytes
    Precision products in the input dtype, accumulation and exponentials in fp32, base 2
    Ragged    rows >= M and columns >= N are masked out of the sums; the D tail loads as 0
    Order     partial sums are stored apart and added in tile order by the next kernel: bitwise repeatable
    """
    if EXACT:
        if tl.load(constants_ptr + REPAIR) != 0:
            for number in range(tl.program_id(0), tiles_of(M, N, CONFIG), tl.num_programs(0)):
                _statistics_tile(
                    number, image, text, row, col, constants_ptr, M, N, D, offset,
                    LABELS, EXCLUDE_SELF, EXACT, MAXIMA, CONFIG,
                )  # fmt: skip
    else:
        _statistics_tile(
            tl.program_id(0), image, text, row, col, constants_ptr, M, N, D, offset,
            LABELS, EXCLUDE_SELF, EXACT, MAXIMA, CONFIG,
        )  # fmt: skip


def _statistics(
    rows: Features,
    cols: Features,
    labels: tuple[Tensor, Tensor] | None,
    constants: Tensor,
    offset: int,
    exclude_self: bool,
    maxima: bool,
    tiles: Tiles | None,
) -> tuple[Tensor, Tensor]:
    """Compute the planes of the rows (planes, M) and of the columns (planes, N), fp64."""
    M, N, (x, y) = len(rows.x), len(cols.x), (rows.x, cols.x)
    has_labels, width = labels is not None, x.shape[1]
    row_label, col_label = labels or (None, None)
    flags = {"LABELS": has_labels, "EXCLUDE_SELF": exclude_self}
    planes = 3 if has_labels else 1
    if maxima:
        planes += 2 if has_labels else 1
    tile = tiles.config("contrastive_fwd", M, N, has_labels) if tiles else None
    fast = TileLaunch(contrastive_fwd_kernel, x, width, {**flags, "EXACT": False, "MAXIMA": False}, tile)
    exact = TileLaunch(contrastive_fwd_kernel, x, width, {**flags, "EXACT": True, "MAXIMA": maxima})
    panel, tiles_n, tiles_m = panels_of((fast.tile, exact.tile), M, N, planes)
    row_out, col_out = (x.new_empty(planes, size, dtype=torch.float64) for size in (M, N))
    # The tiles of a repair store fp64, over the sums that it repairs
    row_part, col_part = (x.new_empty(planes * size, dtype=torch.float64) for size in (tiles_n * panel, tiles_m * N))
    # The largest logits are known to a repair only
    for statistics in (exact,) if maxima else (fast, exact):
        repair = statistics is exact
        parts = (row_part, col_part) if repair else (row_part.view(torch.float32), col_part.view(torch.float32))
        col = FwdSide(cols.factor, col_label, parts[1])
        for i0, i1 in chunks(M, panel):
            shape = i1 - i0, N
            row = FwdSide(rows.factor[i0:i1], None if row_label is None else row_label[i0:i1], parts[0])
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
    maxima: bool = False,
    tiles: Tiles | None = None,
) -> tuple[Tensor, ...]:
    """As the reference's `contrastive_fwd`: 2 M N D operations; norms once, then four launches a panel of rows; no
    host synchronisation. `tiles`: other kernels for the partial sums.

    Columns of one problem share one exponential's offset; where that cannot serve them the device starts a repair.
    """
    n = norms(image, text, scale, offset, normalize, labels is not None)
    if maxima:
        n.constants[REPAIR.value] = 1.0
    rows, cols = Features.of(image, n.row_inv, normalize), Features.of(text, n.col_inv, normalize)
    if labels is not None:
        labels = labels[0].int().contiguous(), labels[1].int().contiguous()
    planes = _statistics(rows, cols, labels, n.constants, offset, exclude_self, maxima, tiles)
    # results must not share memory
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
    """The positives' logits, -inf where there is none: k's own is number k + offset of `size`."""
    partner = torch.arange(len(pos), device=pos.device) + offset
    return torch.where((partner >= 0) & (partner < size), pos, -torch.inf)
