"""Row and column statistics of the logits.

Planes of partial sums, and of what they are reduced to: the log-sum-exp over the negatives; with labels that over the
positives and the positives' sum; with MAXIMA the largest negative, and with labels the largest positive.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastclip.triton_kernels.contrastive_fwd_reduce import REDUCED, contrastive_fwd_reduce_kernel
from fastclip.triton_kernels.features import Features, norms
from fastclip.triton_kernels.launch import (
    FwdSide,
    Tiles,
    cdiv,
    choose,
    chunks,
    launch,
    processors,
    tile_arguments,
    workspace_bytes,
)
from fastclip.triton_kernels.tile import (
    INF,
    OFFSET2,
    REPAIR,
    dot_tile,
    exact_logits2,
    load_vector,
    scaled,
    tile_position,
)
from torch import Tensor

__all__ = ["contrastive_fwd", "contrastive_fwd_kernel", "contrastive_fwd_repair_kernel"]

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
def _store(row_part_ptr, col_part_ptr, plane: tl.constexpr, row, col, m, n, i, j, tiles_m, tiles_n, M, N):
    """Partial results of tile (m, n): rows in [planes, tiles_n, M], columns in [planes, tiles_m, N]."""
    tl.store(row_part_ptr + (plane * tiles_n + n).to(tl.int64) * M + i, row, mask=i < M)
    tl.store(col_part_ptr + (plane * tiles_m + m).to(tl.int64) * N + j, col, mask=j < N)


@triton.jit
def _statistics_tile(
    tile,
    image,
    text,
    image_row_stride,
    text_row_stride,
    row_factor_ptr,
    col_factor_ptr,
    row_label_ptr,
    col_label_ptr,
    constants_ptr,
    row_part_ptr,
    col_part_ptr,
    M,
    N,
    D,
    offset,
    LABELS: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    EXACT: tl.constexpr,
    MAXIMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    m, n = tile_position(tile, tiles_m, tiles_n, GROUP)
    i0, j0 = m * BLOCK_M, n * BLOCK_N
    dot = dot_tile(
        image, text, image_row_stride, text_row_stride, i0, j0, M, N, D,
        BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTOR, EVEN_K, PRECISION,
    )  # fmt: skip
    li, lj = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    i, j = i0 + li, j0 + lj
    row_scale, row_rest = scaled(load_vector(row_factor_ptr, i0, li, M), constants_ptr)
    col_factor = load_vector(col_factor_ptr, j0, lj, N)
    inside = lj[None, :] < N - j0
    if EXACT:
        z2, rest2 = exact_logits2(dot, col_factor[None, :], row_scale, row_rest)
        inside = inside & (li < M - i0)[:, None]
    else:
        z2 = dot * col_factor[None, :]
        # an infinite offset takes the rows beyond M out of the sums, for nothing
        offset2 = tl.where(li < M - i0, tl.load(constants_ptr + OFFSET2), INF)
        e = tl.exp2(tl.fma(z2, tl.broadcast_to(row_scale[:, None], z2.shape), -offset2[:, None]))
        if LABELS:  # what flushes to zero must not look like an empty set
            e = tl.maximum(e, tl.where(li < M - i0, _SMALLEST, 0.0)[:, None], propagate_nan=tl.PropagateNan.ALL)
    own = lj[None, :] - li[:, None] == i0 + offset - j0
    if LABELS:
        row_label = load_vector(row_label_ptr, i0, li, M)
        col_label = load_vector(col_label_ptr, j0, lj, N)
        same = row_label[:, None] == col_label[None, :]
        if EXCLUDE_SELF:
            inside = inside & (own == 0)
        negative, positive = inside & (same == 0), inside & same
    else:
        negative = inside & (own == 0)
    if EXACT:
        row, col, row_top, col_top = _exact_sums(z2, rest2, negative)
        _store(row_part_ptr, col_part_ptr, 0, row, col, m, n, i, j, tiles_m, tiles_n, M, N)
        if MAXIMA:
            _store(row_part_ptr, col_part_ptr, 3 if LABELS else 1, row_top, col_top, m, n, i, j, tiles_m, tiles_n, M, N)
    else:
        if LABELS:
            row, col = _sums(e, negative)
        else:
            first = i0 + offset - j0  # own column of the first row
            if ((first > -BLOCK_M) & (first < BLOCK_N)) | (N - j0 < BLOCK_N):
                e = tl.where(negative, e, 0.0)
            row, col = tl.sum(e, 1), tl.sum(e, 0)
        _store(row_part_ptr, col_part_ptr, 0, row, col, m, n, i, j, tiles_m, tiles_n, M, N)
    if LABELS:
        if EXACT:
            row, col, row_top, col_top = _exact_sums(z2, rest2, positive)
            if MAXIMA:
                _store(row_part_ptr, col_part_ptr, 4, row_top, col_top, m, n, i, j, tiles_m, tiles_n, M, N)
        else:
            row, col = _sums(e, positive)
        _store(row_part_ptr, col_part_ptr, 1, row, col, m, n, i, j, tiles_m, tiles_n, M, N)
        if EXACT:
            rest2 = tl.where(positive, rest2, 0.0)
            row, col = tl.sum(rest2, 1).to(tl.float64), tl.sum(rest2, 0).to(tl.float64)
        else:
            positive = positive & (li < M - i0)[:, None]
            z2 *= row_scale[:, None]
            row, col = 0.0, 0.0
        z2 = tl.where(positive, z2, 0.0)
        row, col = row + tl.sum(z2, 1), col + tl.sum(z2, 0)
        _store(row_part_ptr, col_part_ptr, 2, row, col, m, n, i, j, tiles_m, tiles_n, M, N)


@triton.jit(do_not_specialize=["M", "N", "offset"])
def contrastive_fwd_kernel(
    image,  # (M, D), a pointer or a tensor descriptor
    text,  # (N, D)
    image_row_stride,
    text_row_stride,
    row_factor_ptr,  # (M,) fp32
    col_factor_ptr,  # (N,) fp32
    row_label_ptr,  # (M,) int32; not read without LABELS
    col_label_ptr,  # (N,) int32
    constants_ptr,  # SCALE, OFFSET2, ...
    row_part_ptr,  # (planes, tiles_n, M)
    col_part_ptr,  # (planes, tiles_m, N)
    M,
    N,
    D,
    offset,  # row i's own column is i + offset
    LABELS: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums of one exponential a logit, of every tile's rows and columns; the logits are never stored.

    Math      row_i += sum_j 2^(z2_ij - offset2), col_j += sum_i of the same, over negatives and over positives;
              z2 = log2(e) s r_i c_j <image_i, text_j>
    Program   one (BLOCK_M, BLOCK_N) tile, in groups of tile rows that reuse L2
    Traffic   reads image and text once per tile column and row; writes 4 planes (M tiles_n + N tiles_m) bytes
    Precision products in the input dtype, accumulation and exponentials in fp32, base 2
    Ragged    rows >= M and columns >= N are masked out of the sums; the D tail loads as 0
    Order     partial sums are stored apart and added in tile order by the next kernel: bitwise repeatable
    """
    _statistics_tile(
        tl.program_id(0), image, text, image_row_stride, text_row_stride, row_factor_ptr, col_factor_ptr,
        row_label_ptr, col_label_ptr, constants_ptr, row_part_ptr, col_part_ptr, M, N, D, offset,
        LABELS, EXCLUDE_SELF, False, False,
        BLOCK_M, BLOCK_N, BLOCK_K, GROUP, DESCRIPTOR, EVEN_K, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "N", "offset"])
def contrastive_fwd_repair_kernel(
    image,
    text,
    image_row_stride,
    text_row_stride,
    row_factor_ptr,
    col_factor_ptr,
    row_label_ptr,
    col_label_ptr,
    constants_ptr,  # REPAIR: 0 returns at once
    row_part_ptr,
    col_part_ptr,
    M,
    N,
    D,
    offset,
    LABELS: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    MAXIMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The same statistics where one offset cannot serve all logits: log2 of the sums, from each tile's own maxima.

    Program   persistent, tiles in steps of the grid; returns at once unless the device asked for a repair
    Everything else as in `contrastive_fwd_kernel`, whose partial sums it overwrites; two exponentials a logit.
    """
    if tl.load(constants_ptr + REPAIR) != 0:
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            _statistics_tile(
                tile, image, text, image_row_stride, text_row_stride, row_factor_ptr, col_factor_ptr,
                row_label_ptr, col_label_ptr, constants_ptr, row_part_ptr, col_part_ptr, M, N, D, offset,
                LABELS, EXCLUDE_SELF, True, MAXIMA,
                BLOCK_M, BLOCK_N, BLOCK_K, GROUP, DESCRIPTOR, EVEN_K, PRECISION,
            )  # fmt: skip


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
    has_labels = labels is not None
    n = norms(image, text, scale, offset, normalize, has_labels)
    rows, cols = Features.of(image, n.row_inv, normalize), Features.of(text, n.col_inv, normalize)
    M, N = len(rows.x), len(cols.x)
    planes = (5 if maxima else 3) if has_labels else (2 if maxima else 1)
    row_out, col_out = (image.new_empty(planes, size, dtype=torch.float64) for size in (M, N))
    row_label, col_label = (x.int().contiguous() for x in labels) if labels is not None else (n.row_inv, n.col_inv)
    if maxima:
        n.constants[REPAIR.value] = 1.0
    fast = tiles.config("contrastive_fwd", M, N, has_labels) if tiles else choose("contrastive_fwd", rows.x, has_labels)
    exact = choose("contrastive_fwd_repair", rows.x, has_labels)
    # The partial sums of a panel of rows fit into the workspace
    row_bytes = 8 * planes * max(-(-N // tile.BLOCK_N) + N / tile.BLOCK_M for tile in (fast, exact))
    step = max(fast.BLOCK_M, exact.BLOCK_M)
    panel = min(max(int(workspace_bytes() / row_bytes) // step, 1) * step, M)
    across = max(-(-N // tile.BLOCK_N) for tile in (fast, exact)), max(-(-panel // t.BLOCK_M) for t in (fast, exact))
    row_part = image.new_empty(planes * across[0] * panel, dtype=torch.float64)
    col_part = image.new_empty(planes * across[1] * N, dtype=torch.float64)

    for repair in (True,) if maxima else (False, True):
        tile = exact if repair else fast
        parts = (row_part, col_part) if repair else (row_part.view(torch.float32), col_part.view(torch.float32))
        flags = {"LABELS": has_labels, "MAXIMA": maxima} if repair else {"LABELS": has_labels}
        for i0, i1 in chunks(M, panel):
            x = rows.x[i0:i1]
            tiles_m, tiles_n = cdiv(i1 - i0, tile.BLOCK_M), cdiv(N, tile.BLOCK_N)
            if tiles and not repair:
                sides = (
                    FwdSide(factor, label if has_labels else None, part)
                    for factor, label, part in zip(
                        (rows.factor[i0:i1], cols.factor), (row_label[i0:i1], col_label), parts
                    )
                )
                tiles.contrastive_fwd(tile, x, cols.x, *sides, n.constants, offset + i0, exclude_self)
            else:
                operands, options = tile_arguments(tile, x, cols.x)
                launch(
                    contrastive_fwd_repair_kernel if repair else contrastive_fwd_kernel,
                    min(tiles_m * tiles_n, processors(image.device)) if repair else tiles_m * tiles_n,
                    *operands,
                    *(rows.factor[i0:i1], cols.factor, row_label[i0:i1], col_label, n.constants, *parts),
                    *(i1 - i0, N, x.shape[1], offset + i0),
                    EXCLUDE_SELF=exclude_self,
                    **flags,
                    **options,
                )
            launch(
                contrastive_fwd_reduce_kernel,
                cdiv(i1 - i0, REDUCED) + cdiv(N, REDUCED),
                *(*parts, row_out[:, i0:], col_out, M, N, n.constants, tiles_m, tiles_n),
                *(i1 - i0, N, offset + i0, int(i0 == 0), int(i1 == M)),
                LABELS=has_labels,
                EXACT=repair,
                MAXIMA=maxima,
                BLOCK=REDUCED,
                TILES=8,
            )
    # results must not share memory
    row, col = ([x.clone() for x in out] if planes > 1 else [out[0]] for out in (row_out, col_out))
    if has_labels:
        stats = row[0], col[0], row[2], col[2], row[1], col[1], n.row_inv, n.col_inv
        return (*stats, row[3], col[3], row[4], col[4]) if maxima else stats
    empty = n.row_pos.new_empty(0)
    stats = row[0], col[0], n.row_pos, n.col_pos, empty, empty.clone(), n.row_inv, n.col_inv
    if not maxima:
        return stats
    return *stats, row[1], col[1], _where_own(n.row_pos, offset, N), _where_own(n.col_pos, -offset, M)


def _where_own(pos: Tensor, offset: int, across: int) -> Tensor:
    """The positives' logits, -inf where there is none: k's own is number k + offset of the `across`."""
    own = torch.arange(len(pos), device=pos.device) + offset
    return torch.where((own >= 0) & (own < across), pos, -torch.inf)
