"""Gradients of the contrastive statistics: weights of a block of logits, which `gradients.py` multiplies out."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastclip.triton_kernels.contrastive_bwd_vectors import (
    LABEL,
    NEG,
    NEG_EXACT,
    NEG_LSE2,
    POS,
    POS_EXACT,
    POS_LSE2,
    vectors,
)
from fastclip.triton_kernels.features import Features
from fastclip.triton_kernels.gradients import FACTOR, OWN, Gradients, total_of
from fastclip.triton_kernels.launch import (
    BwdSide,
    Tiles,
    cdiv,
    choose,
    launch,
    output_argument,
    processors,
    tile_arguments,
)
from fastclip.triton_kernels.tile import (
    GAIN,
    INF,
    OFFSET2,
    REPAIR,
    dot_tile,
    exact_logits2,
    halves,
    load_vector,
    scaled,
    store_tile,
    tile_position,
)
from torch import Tensor

__all__ = ["contrastive_bwd"]

_PARTS = 4096  # of d_scale, at a time


@triton.jit
def _plane(vec_ptr, plane: tl.constexpr, plane_stride, k0, k, size):
    return load_vector(vec_ptr + plane * plane_stride.to(tl.int64), k0, k, size)


@triton.jit
def _weigh(
    dot, row_vec_ptr, col_vec_ptr, row_plane, col_plane, constants_ptr, weights, weights_row_stride, i0, j0,
    M, N, offset, LABELS: tl.constexpr, EXCLUDE_SELF: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Stores the weights of dot products (BLOCK_M, BLOCK_N) from (i0, j0) on; returns their rows' share of d_scale."""
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    row_factor = _plane(row_vec_ptr, FACTOR, row_plane, i0, i, M)
    col_factor = _plane(col_vec_ptr, FACTOR, col_plane, j0, j, N)[None, :]
    row_scale, row_rest = scaled(row_factor, constants_ptr)
    inside = j[None, :] < N - j0
    own = j[None, :] - i[:, None] == i0 + offset - j0
    if LABELS:
        row_label = _plane(row_vec_ptr, LABEL, row_plane, i0, i, M).to(tl.int32, bitcast=True)
        col_label = _plane(col_vec_ptr, LABEL, col_plane, j0, j, N).to(tl.int32, bitcast=True)
        positive = row_label[:, None] == col_label[None, :]
    if EXCLUDE_SELF or not LABELS:
        inside = inside & (own == 0)
    if EXACT:
        z2, rest2 = exact_logits2(dot, col_factor, row_scale, row_rest)
        z2 = tl.where(inside & (i < M - i0)[:, None], z2, -INF)
        g = tl.zeros_like(z2)
        for side in tl.static_range(2):
            if side == 0:
                d = _plane(row_vec_ptr, NEG_EXACT, row_plane, i0, i, M)[:, None]
                lse2 = _plane(row_vec_ptr, NEG_LSE2, row_plane, i0, i, M)[:, None]
            else:
                d = _plane(col_vec_ptr, NEG_EXACT, col_plane, j0, j, N)[None, :]
                lse2 = _plane(col_vec_ptr, NEG_LSE2, col_plane, j0, j, N)[None, :]
            if LABELS:
                if side == 0:
                    d = tl.where(positive, _plane(row_vec_ptr, POS_EXACT, row_plane, i0, i, M)[:, None], d)
                    lse2 = tl.where(positive, _plane(row_vec_ptr, POS_LSE2, row_plane, i0, i, M)[:, None], lse2)
                else:
                    d = tl.where(positive, _plane(col_vec_ptr, POS_EXACT, col_plane, j0, j, N)[None, :], d)
                    lse2 = tl.where(positive, _plane(col_vec_ptr, POS_LSE2, col_plane, j0, j, N)[None, :], lse2)
            # an empty set has weight 0 and any log-sum-exp: its exponential must not overflow
            g += tl.where(d == 0, 0.0, d * tl.exp2(z2 - lse2 + rest2))
    else:
        # an infinite offset takes the rows beyond M out, for nothing
        offset2 = tl.where(i < M - i0, tl.load(constants_ptr + OFFSET2), INF)
        g = tl.exp2(tl.fma(dot * col_factor, tl.broadcast_to(row_scale[:, None], dot.shape), -offset2[:, None]))
        if not LABELS:  # a positive's may be infinite: out before it meets a weight
            first = i0 + offset - j0  # own column of the first row
            if ((first > -BLOCK_M) & (first < BLOCK_N)) | (N - j0 < BLOCK_N):
                g = tl.where(inside, g, 0.0)
        row_weight = _plane(row_vec_ptr, NEG, row_plane, i0, i, M)[:, None]
        col_weight = _plane(col_vec_ptr, NEG, col_plane, j0, j, N)[None, :]
        if LABELS:
            row_weight = tl.where(positive, _plane(row_vec_ptr, POS, row_plane, i0, i, M)[:, None], row_weight)
            col_weight = tl.where(positive, _plane(col_vec_ptr, POS, col_plane, j0, j, N)[None, :], col_weight)
        g *= row_weight + col_weight
    if LABELS:
        row_own = _plane(row_vec_ptr, OWN, row_plane, i0, i, M)[:, None]
        col_own = _plane(col_vec_ptr, OWN, col_plane, j0, j, N)[None, :]
        g = tl.where(inside, g + tl.where(positive, row_own + col_own, 0.0), 0.0)
    g *= row_factor[:, None]
    part = tl.sum(g * (dot * col_factor), 1)
    store_tile(weights, weights_row_stride, i0, j0, g * col_factor, BLOCK_M, BLOCK_N, DESCRIPTOR)
    return part


@triton.jit
def _weigh_split(
    dot, row_vec_ptr, col_vec_ptr, row_plane, col_plane, constants_ptr, weights, weights_row_stride, i0, j0,
    M, N, offset, LABELS: tl.constexpr, EXCLUDE_SELF: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DESCRIPTOR: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The same in SPLIT parts one after the other: the temporaries of the others need no registers."""
    if SPLIT == 1:
        return _weigh(
            dot, row_vec_ptr, col_vec_ptr, row_plane, col_plane, constants_ptr, weights, weights_row_stride, i0, j0,
            M, N, offset, LABELS, EXCLUDE_SELF, EXACT, BLOCK_M, BLOCK_N, DESCRIPTOR,
        )  # fmt: skip
    else:
        left, right = halves(dot, BLOCK_M, BLOCK_N)
        part = _weigh_split(
            left, row_vec_ptr, col_vec_ptr, row_plane, col_plane, constants_ptr, weights, weights_row_stride, i0, j0,
            M, N, offset, LABELS, EXCLUDE_SELF, EXACT, BLOCK_M, BLOCK_N // 2, DESCRIPTOR, SPLIT // 2,
        )  # fmt: skip
        return part + _weigh_split(
            right, row_vec_ptr, col_vec_ptr, row_plane, col_plane, constants_ptr, weights, weights_row_stride, i0,
            j0 + BLOCK_N // 2, M, N, offset, LABELS, EXCLUDE_SELF, EXACT, BLOCK_M, BLOCK_N // 2, DESCRIPTOR,
            SPLIT // 2,
        )  # fmt: skip


@triton.jit
def _weights_tile(
    tile, image, text, image_row_stride, text_row_stride, row_vec_ptr, col_vec_ptr, row_plane, col_plane,
    constants_ptr, weights, weights_row_stride, part_ptr, M, N, D, offset,
    LABELS: tl.constexpr, EXCLUDE_SELF: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
    DESCRIPTOR: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m, n = tile_position(tile, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    i0, j0 = m * BLOCK_M, n * BLOCK_N
    dot = dot_tile(
        image, text, image_row_stride, text_row_stride, i0, j0, M, N, D,
        BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTOR, EVEN_K, PRECISION,
    )  # fmt: skip
    part = _weigh_split(
        dot, row_vec_ptr, col_vec_ptr, row_plane, col_plane, constants_ptr, weights, weights_row_stride, i0, j0,
        M, N, offset, LABELS, EXCLUDE_SELF, EXACT, BLOCK_M, BLOCK_N, DESCRIPTOR, SPLIT,
    )  # fmt: skip
    tl.store(part_ptr + tile, tl.sum(part, 0))


@triton.jit(do_not_specialize=["row_plane", "col_plane", "M", "N", "offset"])
def contrastive_bwd_kernel(
    image,  # (M, D), a pointer or a tensor descriptor
    text,  # (N, D)
    image_row_stride,
    text_row_stride,
    row_vec_ptr,  # (planes, row_plane)
    col_vec_ptr,  # (planes, col_plane)
    row_plane,
    col_plane,
    constants_ptr,
    weights,  # (M, N) padded to whole tiles, in the features' dtype
    weights_row_stride,
    part_ptr,  # (tiles,) fp32
    M,
    N,
    D,
    offset,
    LABELS: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr = 1,
):
    """Weights r_i G_ij c_j of a block of logits, for the products with the features; the logits are never stored.

    Math      E = 2^(z2 - offset2), one exponential a logit; negatives G = E (a_i + b_j); positives with labels
              G = d_pos_i + d_pos_j + E (a'_i + b'_j), without 0: the finish adds them, unrounded;
              part = sum r_i G_ij c_j <image_i, text_j>, from the unrounded G
    Program   one (BLOCK_M, BLOCK_N) tile, in groups of tile rows; none where the device asked for a repair
    Traffic   reads image and text once per tile column and row, writes the weights once
    Precision products in the input dtype, the rest in fp32; weights rounded once to the features' dtype
    Ragged    rows >= M and columns >= N become 0
    Order     one partial sum of d_scale a tile: bitwise repeatable
    """
    if tl.load(constants_ptr + REPAIR) == 0:
        _weights_tile(
            tl.program_id(0), image, text, image_row_stride, text_row_stride, row_vec_ptr, col_vec_ptr, row_plane,
            col_plane, constants_ptr, weights, weights_row_stride, part_ptr, M, N, D, offset, LABELS, EXCLUDE_SELF,
            False, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, SPLIT, DESCRIPTOR, EVEN_K, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["row_plane", "col_plane", "M", "N", "offset"])
def contrastive_bwd_repair_kernel(
    image,
    text,
    image_row_stride,
    text_row_stride,
    row_vec_ptr,
    col_vec_ptr,
    row_plane,
    col_plane,
    constants_ptr,  # REPAIR: 0 returns at once
    weights,
    weights_row_stride,
    part_ptr,
    M,
    N,
    D,
    offset,
    LABELS: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr = 1,
):
    """The same weights where one offset cannot serve all logits: d_i 2^(z2 - lse2_i) + d_j 2^(z2 - lse2_j).

    Program   persistent, tiles in steps of the grid; returns at once unless the device asked for a repair
    Everything else as in `contrastive_bwd_kernel`; two exponentials a logit.
    """
    if tl.load(constants_ptr + REPAIR) != 0:
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            _weights_tile(
                tile, image, text, image_row_stride, text_row_stride, row_vec_ptr, col_vec_ptr, row_plane,
                col_plane, constants_ptr, weights, weights_row_stride, part_ptr, M, N, D, offset, LABELS,
                EXCLUDE_SELF, True, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, SPLIT, DESCRIPTOR, EVEN_K, PRECISION,
            )  # fmt: skip


@triton.jit(do_not_specialize=["parts"])
def scale_gradient_kernel(part_ptr, constants_ptr, out_ptr, parts, BLOCK: tl.constexpr):
    """d_scale from its (parts,) shares. One program; fp64, in a fixed order."""
    total = total_of(part_ptr, 0, parts, BLOCK) / tl.load(constants_ptr + GAIN).to(tl.float64)
    tl.store(out_ptr, total.to(out_ptr.dtype.element_ty))


def _side(vec: Tensor, labels: bool) -> BwdSide:
    """Of vectors (planes, size)."""
    if not labels:
        return BwdSide(vec[FACTOR.value], vec[NEG.value])
    label = vec[LABEL.value].view(torch.int32)
    return BwdSide(vec[FACTOR.value], vec[NEG.value], label, vec[POS.value], vec[OWN.value])


def contrastive_bwd(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    labels: tuple[Tensor, Tensor] | None,
    offset: int,
    exclude_self: bool,
    normalize: bool,
    stats: list[Tensor],
    grads: list[Tensor],
    needs: list[bool],
    tiles: Tiles | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As the reference's `contrastive_bwd`: 6 M N D operations, in blocks of weights that fit into the workspace.
    `tiles`: other kernels for the weights."""
    has_labels = labels is not None
    row_inv, col_inv = (x.contiguous() for x in stats[6:])
    rows, cols = Features.of(image, row_inv, normalize), Features.of(text, col_inv, normalize)
    M, N, D = len(image), len(text), image.shape[1]
    gradients = Gradients(rows, cols, D)
    fast, exact = (choose(name, rows.x, has_labels) for name in ("contrastive_bwd", "contrastive_bwd_repair"))
    if tiles:
        fast = tiles.config("contrastive_bwd", *gradients.block, has_labels)
    parts = gradients.count_tiles(fast, exact)
    part = image.new_empty(parts + gradients.finish_parts, dtype=torch.float32)
    row_vec, col_vec, constants = vectors(rows, cols, scale, labels, offset, normalize, stats, grads, part)
    done = 0

    def weigh(i0: int, i1: int, j0: int, j1: int, weights: Tensor) -> None:
        nonlocal done
        for repair in (False, True):
            tile = exact if repair else fast
            x, y = rows.x[i0:i1], cols.x[j0:j1]
            if tiles and not repair:
                sides = _side(row_vec[:, i0:], has_labels), _side(col_vec[:, j0:], has_labels)
                at = offset + i0 - j0
                tiles.contrastive_bwd(tile, x, y, *sides, constants, at, exclude_self, weights, part[done:])
                continue
            operands, options = tile_arguments(tile, x, y)
            count = cdiv(i1 - i0, tile.BLOCK_M) * cdiv(j1 - j0, tile.BLOCK_N)
            launch(
                contrastive_bwd_repair_kernel if repair else contrastive_bwd_kernel,
                min(count, processors(image.device)) if repair else count,
                *(*operands, row_vec[:, i0:], col_vec[:, j0:], M, N, constants),
                *(output_argument(tile, weights, x), weights.stride(0), part[done:]),
                *(i1 - i0, j1 - j0, x.shape[1], offset + i0 - j0),
                LABELS=has_labels,
                EXCLUDE_SELF=exclude_self,
                **options,
            )
        done += gradients.tiles(i1 - i0, j1 - j0, fast, exact)

    d_image = torch.empty_like(image, memory_format=torch.contiguous_format) if needs[0] else None
    d_text = torch.empty_like(text, memory_format=torch.contiguous_format) if needs[1] else None
    gradients.compute(weigh, row_vec, col_vec, None if has_labels else offset, part[parts:], d_image, d_text)
    d_scale = torch.empty_like(scale) if needs[2] else None
    if d_scale is not None:
        launch(scale_gradient_kernel, 1, part, constants, d_scale, len(part), BLOCK=_PARTS, num_warps=8)
    return d_image, d_text, d_scale
