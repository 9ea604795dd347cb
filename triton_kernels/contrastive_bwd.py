"""Gradients of the contrastive statistics: the weights of a block of logits, which `gradients.py` turns into gradients.

i and j index the M images and N texts of a block, D is the embedding size. r_i and c_j are the factors that the dot
products are multiplied by. d_i and d_j are the derivatives of the loss with respect to the log-sum-exps of row i and of
column j, d_pos_i and d_pos_j those with respect to the sums of their positive logits, all times the gain (see tile.py).
c is the number that is subtracted from every logit before the exponential (docs/mathematics.md), and c2 = log2(e) c.
`offset` is that of the diagonal: row i meets it in column i + offset.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastclip.triton_kernels.contrastive_bwd_vectors import (
    LABEL,
    LIMIT,
    NEG,
    NEG_EXACT,
    NEG_LSE2,
    POS,
    POS_EXACT,
    POS_LSE2,
    vectors,
)
from fastclip.triton_kernels.features import Features
from fastclip.triton_kernels.gradients import DIAGONAL, FACTOR, Gradients, block_size, total_of
from fastclip.triton_kernels.launch import BwdSide, TileLaunch, Tiles, launch
from fastclip.triton_kernels.tile import (
    GAIN,
    INF,
    OFFSET2,
    REPAIR,
    dot_tile,
    exact_logits2,
    halves,
    load_vector,
    needs_mask,
    on_diagonal,
    scaled,
    store_tile,
    tile_at,
    tiles_of,
)
from torch import Tensor

__all__ = ["contrastive_bwd", "contrastive_bwd_kernel"]

_PARTS = 4096  # partial sums of d_scale added per step


class BwdVectors(NamedTuple):
    """Vectors of one side as device values. `vec` points to the first row (or column) of the block."""

    vec: Any  # (planes, words per plane) fp32
    plane: Any  # words per plane: the distance from one plane to the next
    k0: Any  # first row (or column) of the tile
    size: Any  # rows (or columns) of the block


@triton.jit
def _plane(side, number: tl.constexpr, k):
    return load_vector(side.vec + number * side.plane.to(tl.int64), side.k0, k, side.size)


@triton.jit
def _weigh(
    dot, row, col, constants_ptr, weights, offset,
    LABELS: tl.constexpr, EXCLUDE_SELF: tl.constexpr, EXACT: tl.constexpr, DESCRIPTOR: tl.constexpr,
    LIMITS: tl.constexpr,
):  # fmt: skip
    """Store the weights of a tile of dot products that starts at (row.k0, col.k0); return d_scale per row."""
    i, j = tl.arange(0, dot.shape[0]), tl.arange(0, dot.shape[1])
    i0, j0, M, N = row.k0, col.k0, row.size, col.size
    row_factor, col_factor = _plane(row, FACTOR, i), _plane(col, FACTOR, j)[None, :]
    row_scale, row_rest = scaled(row_factor, constants_ptr)
    inside = j[None, :] < N - j0
    if LABELS:
        row_label = _plane(row, LABEL, i).to(tl.int32, bitcast=True)
        col_label = _plane(col, LABEL, j).to(tl.int32, bitcast=True)
        positive = row_label[:, None] == col_label[None, :]
    if EXCLUDE_SELF or not LABELS:
        inside = inside & (on_diagonal(i, j, i0, j0, offset) == 0)
    if LIMITS:
        # The product that the forward compares, so that both leave out the same pairs
        logit2 = dot * col_factor * row_scale[:, None]
        row_over, col_over = logit2 > _plane(row, LIMIT, i)[:, None], logit2 > _plane(col, LIMIT, j)[None, :]
        if LABELS:
            row_over, col_over = row_over & (positive == 0), col_over & (positive == 0)
    if EXACT:
        z2, rest2 = exact_logits2(dot, col_factor, row_scale, row_rest)
        z2 = tl.where(inside & (i < M - i0)[:, None], z2, -INF)
        g = tl.zeros_like(z2)
        for side in tl.static_range(2):
            if side == 0:
                d, lse2 = _plane(row, NEG_EXACT, i)[:, None], _plane(row, NEG_LSE2, i)[:, None]
            else:
                d, lse2 = _plane(col, NEG_EXACT, j)[None, :], _plane(col, NEG_LSE2, j)[None, :]
            if LABELS:
                if side == 0:
                    d = tl.where(positive, _plane(row, POS_EXACT, i)[:, None], d)
                    lse2 = tl.where(positive, _plane(row, POS_LSE2, i)[:, None], lse2)
                else:
                    d = tl.where(positive, _plane(col, POS_EXACT, j)[None, :], d)
                    lse2 = tl.where(positive, _plane(col, POS_LSE2, j)[None, :], lse2)
            if LIMITS:
                d = tl.where(row_over if side == 0 else col_over, 0.0, d)
            # An empty set has d = 0 and an arbitrary log-sum-exp. Its exponential may be infinite, and 0 * inf is NaN.
            g += tl.where(d == 0, 0.0, d * tl.exp2(z2 - lse2 + rest2))
    else:
        # An infinite c2 turns the exponentials of rows beyond M into 0 without a mask
        offset2 = tl.where(i < M - i0, tl.load(constants_ptr + OFFSET2), INF)
        g = tl.exp2(tl.fma(dot * col_factor, tl.broadcast_to(row_scale[:, None], dot.shape), -offset2[:, None]))
        # A positive's exponential may be infinite, so it becomes 0 before it is multiplied by a weight. Only tiles on
        # the diagonal or at the right edge need this mask. With labels any tile may have positives, masked below.
        if not LABELS:  # noqa: SIM102 - LABELS is a compile-time constant, the inner condition is not
            if needs_mask(i0, j0, N, offset, dot.shape[0], dot.shape[1]):
                g = tl.where(inside, g, 0.0)
        row_weight, col_weight = _plane(row, NEG, i)[:, None], _plane(col, NEG, j)[None, :]
        if LIMITS:
            row_weight, col_weight = tl.where(row_over, 0.0, row_weight), tl.where(col_over, 0.0, col_weight)
            g = tl.where(row_over & col_over, 0.0, g)  # it may be infinite
        if LABELS:
            row_weight = tl.where(positive, _plane(row, POS, i)[:, None], row_weight)
            col_weight = tl.where(positive, _plane(col, POS, j)[None, :], col_weight)
        g *= row_weight + col_weight
    if LABELS:
        d_pos = _plane(row, DIAGONAL, i)[:, None] + _plane(col, DIAGONAL, j)[None, :]
        g = tl.where(inside, g + tl.where(positive, d_pos, 0.0), 0.0)
    g *= row_factor[:, None]
    # d_scale is summed from the fp32 weights: <image, d_image> / s would divide by a scale that may be 0
    part = tl.sum(g * (dot * col_factor), 1)
    store_tile(weights, i0, j0, g * col_factor, DESCRIPTOR)
    return part


@triton.jit
def _weigh_split(
    dot, row, col, constants_ptr, weights, offset,
    LABELS: tl.constexpr, EXCLUDE_SELF: tl.constexpr, EXACT: tl.constexpr, DESCRIPTOR: tl.constexpr,
    LIMITS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Run `_weigh` on SPLIT column parts, one after the other, so that only one part's temporaries occupy registers."""
    if SPLIT == 1:
        return _weigh(dot, row, col, constants_ptr, weights, offset, LABELS, EXCLUDE_SELF, EXACT, DESCRIPTOR, LIMITS)
    else:
        left, right = halves(dot)
        right_col = BwdVectors(col.vec, col.plane, col.k0 + dot.shape[1] // 2, col.size)
        part = _weigh_split(
            left, row, col, constants_ptr, weights, offset,
            LABELS, EXCLUDE_SELF, EXACT, DESCRIPTOR, LIMITS, SPLIT // 2,
        )  # fmt: skip
        return part + _weigh_split(
            right, row, right_col, constants_ptr, weights, offset,
            LABELS, EXCLUDE_SELF, EXACT, DESCRIPTOR, LIMITS, SPLIT // 2,
        )  # fmt: skip


@triton.jit
def _weights_tile(
    number, image, text, row_vec_ptr, col_vec_ptr, row_plane, col_plane, constants_ptr, weights, part_ptr,
    M, N, D, offset, LABELS: tl.constexpr, EXCLUDE_SELF: tl.constexpr, EXACT: tl.constexpr, CONFIG: tl.constexpr,
    LIMITS: tl.constexpr,
):  # fmt: skip
    tile = tile_at(number, M, N, offset, CONFIG)
    dot = dot_tile(image, text, tile, D, CONFIG)
    row, col = BwdVectors(row_vec_ptr, row_plane, tile.i0, M), BwdVectors(col_vec_ptr, col_plane, tile.j0, N)
    part = _weigh_split(
        dot, row, col, constants_ptr, weights, offset, LABELS, EXCLUDE_SELF, EXACT, CONFIG.DESCRIPTOR, LIMITS,
        CONFIG.SPLIT,
    )  # fmt: skip
    tl.store(part_ptr + number, tl.sum(part, 0))


@triton.jit(do_not_specialize=["row_plane", "col_plane", "M", "N", "offset"])
def contrastive_bwd_kernel(
    image,  # (M, D), a `Matrix` or a tensor descriptor
    text,  # (N, D)
    row_vec_ptr,  # (planes, row_plane) fp32
    col_vec_ptr,  # (planes, col_plane) fp32
    row_plane,
    col_plane,
    constants_ptr,  # REPAIR decides on the device whether the EXACT or the fast launch does the work
    weights,  # (M, N) padded to whole tiles, in the features' dtype
    part_ptr,  # (tiles,) fp32
    M,
    N,
    D,
    offset,  # row i meets the diagonal in column i + offset
    LABELS: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    EXACT: tl.constexpr,
    CONFIG: tl.constexpr,
    LIMITS: tl.constexpr = False,
):
    """Weights r_i G_ij c_j of a block, stored for the products with the features. The logits are never stored.

    Math      z2 = log2(e) s r_i c_j <image_i, text_j> and E = 2^(z2 - c2) = exp(z - c), one exponential per logit
              G = E (a_i + b_j) at negatives
              a_i = d_i exp(c - lse_i) and b_j = d_j exp(c - lse_j), from the plane NEG
              with LIMITS a_i or b_j is 0 at pairs above the limit of the row or of the column
              G = d_pos_i + d_pos_j + E (a'_i + b'_j) at positives with LABELS
              a' and b' are a and b for the log-sum-exps of the positives, from the plane POS
              G = 0 at the diagonal without LABELS, because the finish adds those positives in fp32
              EXACT replaces E (a_i + b_j) by d_i 2^(z2 - lse2_i) + d_j 2^(z2 - lse2_j), two exponentials per logit
              part = sum of r_i G_ij c_j <image_i, text_j> over a tile, from G before it is rounded
    Program   one (BLOCK_M, BLOCK_N) tile, in groups of tile rows that reuse L2
              EXACT launches persistent programs that stride over the tiles
    Traffic   reads image once per tile column and text once per tile row, writes the weights once
    Precision products in the input dtype, all else in fp32, weights rounded once to the dtype of the features
    Ragged    rows >= M and columns >= N get the weight 0
    Order     every tile stores its partial sum of d_scale: bitwise repeatable
    """
    # Both variants are always launched, and one of them returns at once: the host need not wait for the value of REPAIR
    repair = tl.load(constants_ptr + REPAIR) != 0
    if EXACT:
        if repair:
            for number in range(tl.program_id(0), tiles_of(M, N, CONFIG), tl.num_programs(0)):
                _weights_tile(
                    number, image, text, row_vec_ptr, col_vec_ptr, row_plane, col_plane, constants_ptr, weights,
                    part_ptr, M, N, D, offset, LABELS, EXCLUDE_SELF, EXACT, CONFIG, LIMITS,
                )  # fmt: skip
    elif repair == 0:
        _weights_tile(
            tl.program_id(0), image, text, row_vec_ptr, col_vec_ptr, row_plane, col_plane, constants_ptr, weights,
            part_ptr, M, N, D, offset, LABELS, EXCLUDE_SELF, EXACT, CONFIG, LIMITS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["parts"])
def scale_gradient_kernel(part_ptr, constants_ptr, out_ptr, parts, BLOCK: tl.constexpr):
    """Add up the (parts,) partial sums of d_scale in fp64 and in a fixed order. One program."""
    total = total_of(part_ptr, 0, parts, BLOCK) / tl.load(constants_ptr + GAIN).to(tl.float64)
    tl.store(out_ptr, total.to(out_ptr.dtype.element_ty))


def _side(vec: Tensor, labels: bool) -> BwdSide:
    """Pick the planes of `vec` (planes, size) that `Tiles.contrastive_bwd` reads."""
    if not labels:
        return BwdSide(vec[FACTOR.value], vec[NEG.value])
    label = vec[LABEL.value].view(torch.int32)
    return BwdSide(vec[FACTOR.value], vec[NEG.value], label, vec[POS.value], vec[DIAGONAL.value])


def contrastive_bwd(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    labels: tuple[Tensor, Tensor] | None,
    offset: int,
    exclude_self: bool,
    normalize: bool,
    limits: tuple[Tensor, Tensor] | None,
    stats: list[Tensor],
    grads: list[Tensor],
    needs: list[bool],
    tiles: Tiles | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of image, text and scale, each None if `needs` is False for it.

    Arguments and results are those of the reference's `contrastive_bwd`. It takes 6 M N D operations, in blocks whose
    weights fit into the workspace. tiles: kernels that compute the weights in place of `contrastive_bwd_kernel`, if
    there are no limits.
    """
    has_labels = labels is not None
    row_inv, col_inv = (x.contiguous() for x in stats[6:])
    rows, cols = Features.of(image, row_inv, normalize), Features.of(text, col_inv, normalize)
    M, N, D, width = len(image), len(text), image.shape[1], rows.x.shape[1]
    block_m, block_n = block_size(rows.x, M, N, D)
    tile = tiles.config("contrastive_bwd", min(block_m, M), min(block_n, N), has_labels) if tiles else None
    flags = {"LABELS": has_labels, "EXCLUDE_SELF": exclude_self, "LIMITS": limits is not None}
    fast = TileLaunch(contrastive_bwd_kernel, rows.x, width, {**flags, "EXACT": False}, tile)
    exact = TileLaunch(contrastive_bwd_kernel, rows.x, width, {**flags, "EXACT": True})
    gradients = Gradients(rows, cols, D, (block_m, block_n), (fast.tile, exact.tile))
    part = image.new_empty(gradients.tile_parts + gradients.finish_parts, dtype=torch.float32)
    row_vec, col_vec, constants = vectors(rows, cols, scale, labels, limits, offset, normalize, stats, grads, part)

    def weigh(i0: int, i1: int, j0: int, j1: int, weights: Tensor, part: Tensor) -> None:
        x, y, at = rows.x[i0:i1], cols.x[j0:j1], offset + i0 - j0
        for weighing in (fast, exact):
            if tiles and weighing is fast:
                sides = _side(row_vec[:, i0:], has_labels), _side(col_vec[:, j0:], has_labels)
                tiles.contrastive_bwd(fast.tile, x, y, *sides, constants, at, exclude_self, weights, part)
                continue
            launch(
                weighing.kernel,
                weighing.programs(i1 - i0, j1 - j0),
                *(*weighing.operands(x, y), row_vec[:, i0:], col_vec[:, j0:], M, N, constants),
                *(weighing.output(weights), part, i1 - i0, j1 - j0, width, at),
                **weighing.options,
            )

    d_image = torch.empty_like(image, memory_format=torch.contiguous_format) if needs[0] else None
    d_text = torch.empty_like(text, memory_format=torch.contiguous_format) if needs[1] else None
    gradients.compute(weigh, row_vec, col_vec, None if has_labels else offset, part, d_image, d_text)
    d_scale = torch.empty_like(scale) if needs[2] else None
    if d_scale is not None:
        launch(scale_gradient_kernel, 1, part, constants, d_scale, len(part), BLOCK=_PARTS, num_warps=8)
    return d_image, d_text, d_scale
