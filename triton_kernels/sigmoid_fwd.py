"""Kernels of the sigmoid loss's forward: norms with the diagonal pairs, tiles, and a finish with the scalar sums.

The weight of a pair is sigmoid(x) and depends on no sum over other pairs, so one pass over the logits computes the loss
and the weights of all gradients. Without labels the diagonal pairs, the only positives, are computed apart in fp64 and
added by the finish: they have the largest weights of a row, which would lose the most if they were rounded to 16 bits.
With labels the tiles compute the positives, and no pair is on the diagonal of the norms and of the finish.

M, N and D are the numbers of images, texts and features. i and j index images (rows) and texts (columns).
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastclip.triton_kernels.features import bound_of, high_bit, inverse_norm, pair_sums, unit_norm
from fastclip.triton_kernels.gradients import DIAGONAL, finish_rows, in_two, store_side, total_of
from fastclip.triton_kernels.tile import (
    GAIN,
    INF,
    LOG2E,
    SCALE,
    dot_tile,
    halves,
    load_vector,
    on_diagonal,
    softplus,
    store_tile,
    tile_at,
)

__all__ = ["sigmoid_bound_kernel", "sigmoid_finish_kernel", "sigmoid_fwd_kernel", "sigmoid_norms_kernel"]


@triton.jit
def _log1p_of_small(t):
    """Return log(1 + t) for t in [0, 1] as t P(t) with a polynomial P, relative error 2e-7.

    For a solved pair t is far below the spacing of fp32 numbers at 1, and 1 + t would round to 1.
    """
    p = tl.fma(tl.full(t.shape, 0.00523268431, tl.float32), t, -0.0295051988)
    p = tl.fma(p, t, 0.0782258883)
    p = tl.fma(p, t, -0.136632398)
    p = tl.fma(p, t, 0.191060036)
    p = tl.fma(p, t, -0.24842982)
    p = tl.fma(p, t, 0.333190978)
    p = tl.fma(p, t, -0.499994934)
    return t * tl.fma(p, t, 0.99999994)


@triton.jit
def _store_constants(constants_ptr, scale, bound, bias, HALF: tl.constexpr):
    """Store SCALE and GAIN, the power of two that stored weights are multiplied by; 1 unless the features are fp16.

    gain |G| < 2^13 follows from the bound on the logits. Without a gain the tiny weights of a solved batch would flush
    to zero in fp16. An infinite bound stands for weights of up to 1, those of positives.
    """
    tl.store(constants_ptr + SCALE, scale)
    gain = tl.full((), 1.0, tl.float64)
    if HALF:
        gain = 4096.0 / high_bit(tl.exp(tl.minimum(tl.maximum(bound.to(tl.float64) + bias, -70.0), 0.0)))
    tl.store(constants_ptr + GAIN, gain.to(tl.float32))


@triton.jit
def _store_vectors(
    x, y, scale, bias, vec_ptr, k0, size, other_size, D, offset,
    NORMALIZE: tl.constexpr, COPY: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store the vectors of BLOCK rows of one side, from k0 on.

    Returns the largest norm of these rows after scaling, and their diagonal pairs' sums of loss, d_scale and d_bias.
    """
    k = k0 + tl.arange(0, BLOCK)
    partner, in_rows = k + offset, k < size
    has_partner = in_rows & (partner >= 0) & (partner < other_size)
    xx, yy, xy = pair_sums(x, y, k, partner, in_rows, has_partner, D, True, BLOCK, BLOCK_D)
    inv = inverse_norm(xx, NORMALIZE)
    plane = size.to(tl.int64)
    store_side(vec_ptr + k, plane, inv, in_rows, NORMALIZE, COPY)
    cos = inv.to(tl.float64) * inverse_norm(yy, NORMALIZE).to(tl.float64) * xy
    negated = -(scale.to(tl.float64) * cos + bias)
    loss, sigmoid = softplus(negated)
    g = tl.where(has_partner, -sigmoid, 0.0)
    tl.store(vec_ptr + DIAGONAL * plane + k, g.to(tl.float32), mask=in_rows)
    # 0 * negated makes the loss NaN if the logit is infinite. softplus alone could return 0 and hide the overflow.
    loss = tl.sum(tl.where(has_partner, loss + 0.0 * negated, 0.0), 0)
    return tl.max(unit_norm(xx, inv), 0), loss, tl.sum(tl.where(has_partner, g * cos, 0.0), 0), tl.sum(g, 0)


@triton.jit(do_not_specialize=["scale_ptr", "bias_ptr", "part_ptr", "parts", "M", "N", "offset"])
def sigmoid_norms_kernel(
    image,  # a `Matrix` (M, D)
    text,  # (N, D)
    scale_ptr,
    bias_ptr,
    constants_ptr,
    row_vec_ptr,  # (planes, M): FACTOR, DIAGONAL, OUT, PROJECT
    col_vec_ptr,  # (planes, N)
    top_ptr,  # (programs,) fp32; written with BOUND
    part_ptr,  # (3, parts) fp64: loss, d_scale, d_bias, one sum per program of images; starts after the tiles' sums
    parts,
    M,
    N,
    D,
    offset,
    NORMALIZE: tl.constexpr,
    COPY: tl.constexpr,
    HALF: tl.constexpr,
    BOUND: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LABELS: tl.constexpr = False,  # the tiles have positives; `offset` is then beyond the texts
):
    """Vectors of all rows, and the diagonal pairs' partial sums of loss, d_scale and d_bias.

    Math      r_i = 1 / max(|image_i|, 1e-12) with NORMALIZE, else 1, and c_j in the same way for text_j
              x = -(s r_i c_j <image_i, text_j> + b) for the diagonal pairs, j = i + offset
              loss = softplus(x) and DIAGONAL_i = -sigmoid(x)
              FACTOR_i = r_i, or r_i / 2^e with COPY, for rows that are copied times OUT_i = 2^e
    Program   BLOCK rows of images or of texts
              program 0 also writes the constants, except with BOUND, when `sigmoid_bound_kernel` does
    Traffic   reads every row twice, as itself and as the partner of its pair
    Precision fp64, vectors rounded once
    Ragged    rows beyond the last and the D tail load as 0
    Order     one program computes a whole row and stores its own partial sums: bitwise repeatable
    """
    block, blocks = tl.program_id(0), tl.cdiv(M, BLOCK)
    scale, bias = tl.load(scale_ptr).to(tl.float32), tl.load(bias_ptr).to(tl.float64)
    if block < blocks:
        top, loss, d_scale, d_bias = _store_vectors(
            image, text, scale, bias, row_vec_ptr, block * BLOCK, M, N, D, offset, NORMALIZE, COPY, BLOCK, BLOCK_D
        )  # fmt: skip
        plane = parts.to(tl.int64)
        tl.store(part_ptr + block, loss)
        tl.store(part_ptr + plane + block, d_scale)
        tl.store(part_ptr + 2 * plane + block, d_bias)
    else:
        first = (block - blocks) * BLOCK
        top, _, _, _ = _store_vectors(
            text, image, scale, bias, col_vec_ptr, first, N, M, D, -offset, NORMALIZE, COPY, BLOCK, BLOCK_D
        )  # fmt: skip
    if BOUND:
        tl.store(top_ptr + block, top)
    elif block == 0:
        bound = tl.full((), INF, tl.float32) if LABELS else tl.abs(scale)
        _store_constants(constants_ptr, scale, bound, bias, HALF)


@triton.jit(do_not_specialize=["scale_ptr", "bias_ptr", "rows", "cols"])
def sigmoid_bound_kernel(top_ptr, constants_ptr, scale_ptr, bias_ptr, rows, cols, BLOCK: tl.constexpr):
    """Store the constants for fp16 features that are not normalised. One program.

    The bound on the logits comes from the largest norms that (rows + cols) programs of `sigmoid_norms_kernel` found.
    """
    scale = tl.load(scale_ptr).to(tl.float32)
    bound = bound_of(scale, top_ptr, rows, cols, False, BLOCK)
    _store_constants(constants_ptr, scale, bound, tl.load(bias_ptr).to(tl.float64), True)


@triton.jit
def _pairs(
    dot, row, col, constants_ptr, bias_ptr, weights, tile, j0, GRADIENTS: tl.constexpr, DESCRIPTOR: tl.constexpr,
    LABELS: tl.constexpr, EXCLUDE_SELF: tl.constexpr, LIMITS: tl.constexpr,
):  # fmt: skip
    """Store the weights of a part of a tile that starts at column j0; return loss, d_scale and d_bias per row.

    Without GRADIENTS nothing is stored, and the last two returned values have no meaning.
    """
    i, j = tl.arange(0, dot.shape[0]), tl.arange(0, dot.shape[1])
    i0, M, N = tile.i0, tile.M, tile.N
    if LABELS or LIMITS:
        row_factor, col_factor = load_vector(row.factor, i0, i, M), load_vector(col.factor, j0, j, N)[None, :]
    else:
        row_factor, col_factor = load_vector(row, i0, i, M), load_vector(col, j0, j, N)[None, :]
    scale = tl.load(constants_ptr + SCALE).to(tl.float64)
    row_scale = (row_factor.to(tl.float64) * scale).to(tl.float32)[:, None]
    inside = (i < M - i0)[:, None] & (j < N - j0)[None, :]
    if EXCLUDE_SELF or not LABELS:
        inside = inside & (on_diagonal(i, j, i0, j0, tile.offset) == 0)
    if LABELS:
        positive = load_vector(row.label, i0, i, M)[:, None] == load_vector(col.label, j0, j, N)[None, :]
    x = dot * col_factor
    if LIMITS:  # NaN is not above a limit and stays
        above = x * row_scale > load_vector(row.limit, i0, i, M)[:, None]
        above = above | (x * row_scale > load_vector(col.limit, j0, j, N)[None, :])
        if LABELS:
            above = above & (positive == 0)
        inside = inside & (above == 0)
    bias = tl.full(x.shape, 0.0, tl.float32) + tl.load(bias_ptr).to(tl.float32)
    x = tl.fma(x, tl.broadcast_to(row_scale, x.shape), bias)
    least = tl.zeros_like(x)
    if LABELS:
        x = tl.where(positive, -x, x)
        least = 0.0 * x  # NaN if the logit of a positive overflowed, whose loss would be 0
    t = tl.exp2(-tl.abs(x) * LOG2E)
    loss = tl.sum(tl.where(inside, tl.where(x > 0, x, least) + _log1p_of_small(t), 0.0), 1)
    if GRADIENTS:
        g = tl.where(inside, tl.where(x >= 0, 1.0, t) / (1.0 + t), 0.0)
        if LABELS:
            g = tl.where(positive, -g, g)
        d_bias = tl.sum(g, 1)
        g *= (row_factor * tl.load(constants_ptr + GAIN))[:, None] * col_factor
        store_tile(weights, i0, j0, g, DESCRIPTOR)
        return loss, tl.sum(g * dot, 1), d_bias
    else:
        return loss, loss, loss


@triton.jit
def _pairs_split(
    dot, row, col, constants_ptr, bias_ptr, weights, tile, j0, GRADIENTS: tl.constexpr, DESCRIPTOR: tl.constexpr,
    LABELS: tl.constexpr, EXCLUDE_SELF: tl.constexpr, LIMITS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Run `_pairs` on SPLIT column parts, one after the other, so that only one part's temporaries occupy registers."""
    if SPLIT == 1:
        return _pairs(
            dot, row, col, constants_ptr, bias_ptr, weights, tile, j0, GRADIENTS, DESCRIPTOR,
            LABELS, EXCLUDE_SELF, LIMITS,
        )  # fmt: skip
    else:
        left, right = halves(dot)
        loss, d_scale, d_bias = _pairs_split(
            left, row, col, constants_ptr, bias_ptr, weights, tile, j0,
            GRADIENTS, DESCRIPTOR, LABELS, EXCLUDE_SELF, LIMITS, SPLIT // 2,
        )  # fmt: skip
        more_loss, more_d_scale, more_d_bias = _pairs_split(
            right, row, col, constants_ptr, bias_ptr, weights, tile, j0 + dot.shape[1] // 2,
            GRADIENTS, DESCRIPTOR, LABELS, EXCLUDE_SELF, LIMITS, SPLIT // 2,
        )  # fmt: skip
        return loss + more_loss, d_scale + more_d_scale, d_bias + more_d_bias


@triton.jit(do_not_specialize=["bias_ptr", "part_ptr", "parts", "M", "N", "offset"])
def sigmoid_fwd_kernel(
    image,  # (M, D), a `Matrix` or a tensor descriptor
    text,  # (N, D)
    row,  # (M,) fp32: the plane FACTOR; with LABELS or LIMITS a `PairSide`
    col,  # (N,) fp32, or a `PairSide`
    constants_ptr,
    bias_ptr,
    weights,  # (M, N) padded to whole tiles, in the features' dtype; not written without GRADIENTS
    part_ptr,  # (3, parts) fp64: loss, d_scale, d_bias of every tile; points to the first tile of this block
    parts,
    M,
    N,
    D,
    offset,
    GRADIENTS: tl.constexpr,
    CONFIG: tl.constexpr,
    LABELS: tl.constexpr = False,
    EXCLUDE_SELF: tl.constexpr = False,
    LIMITS: tl.constexpr = False,
):
    """Losses of a block of pairs, and the weights r_i G_ij c_j of their gradients. The logits are never stored.

    Math      x = s r_i c_j <image_i, text_j> + b and t = exp(-|x|), one exponential per logit
              loss = max(x, 0) + log1p(t)
              G = sigmoid(x) = (x >= 0 ? 1 : t) / (1 + t), stored times the gain
              diagonal pairs contribute 0 here, because the norms kernel and the finish add them
              with LABELS x is negated for positives, and so is G, and diagonal pairs are left out with EXCLUDE_SELF
              with LIMITS a negative with x - b above the limit of its row or of its column is left out
    Program   one (BLOCK_M, BLOCK_N) tile, in groups of tile rows that reuse L2
    Traffic   reads image once per tile column and text once per tile row, writes the weights once
    Precision products in the input dtype, all else in fp32, weights rounded once to the dtype of the features
    Ragged    rows >= M and columns >= N are left out of the sums and get the weight 0
    Order     every tile stores its own partial sums: bitwise repeatable
    """
    number = tl.program_id(0)
    tile = tile_at(number, M, N, offset, CONFIG)
    dot = dot_tile(image, text, tile, D, CONFIG)
    loss, d_scale, d_bias = _pairs_split(
        dot, row, col, constants_ptr, bias_ptr, weights, tile, tile.j0,
        GRADIENTS, CONFIG.DESCRIPTOR, LABELS, EXCLUDE_SELF, LIMITS, CONFIG.SPLIT,
    )  # fmt: skip
    plane = parts.to(tl.int64)
    tl.store(part_ptr + number, tl.sum(loss, 0).to(tl.float64))
    if GRADIENTS:
        tl.store(part_ptr + plane + number, tl.sum(d_scale, 0).to(tl.float64))
        tl.store(part_ptr + 2 * plane + number, tl.sum(d_bias, 0).to(tl.float64))


@triton.jit(
    do_not_specialize=["loss_ptr", "grad_ptr", "tile_parts", "parts", "divisor", "i0", "rows", "M", "N", "offset"]
)
def sigmoid_finish_kernel(
    row,  # a `FinishSide`, whose raw (rows, ...) starts at image i0
    col,  # a `FinishSide` of all texts
    constants_ptr,
    part_ptr,  # (3, parts) fp64: loss, d_scale, d_bias; first of the tiles, then of the diagonal pairs. Read with SUMS
    loss_ptr,  # () fp32 or fp64; written with SUMS
    grad_ptr,  # (2,): d_scale and d_bias; written with SCALARS
    tile_parts,
    parts,
    divisor,
    i0,
    rows,
    M,
    N,
    D,
    offset,
    SUMS: tl.constexpr,
    SCALARS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Gradients of the features from the products, and the loss, d_scale and d_bias from their partial sums.

    Math      g_k = raw_k + gain DIAGONAL_k FACTOR_k FACTOR_j other_j with j = k + offset
              out_k = s OUT_k (g_k - x_k <x_k, g_k> / <x_k, x_k>) / (gain divisor), see `finish_kernel`
              loss and d_bias = sum of their parts / divisor
              d_scale = (sum over tiles / gain + sum over diagonal pairs) / divisor
    Program   BLOCK of `rows` images, and after them BLOCK of all texts, in two passes over D
              with SUMS one more program, the first, adds up the scalars
    Traffic   reads raw, x and other twice, writes out once
    Precision fp32, sums in fp64, with the weight of the diagonal pair never rounded to the dtype of the features
    Ragged    rows beyond the last and the D tail load as 0
    Order     one program computes a whole row, sums run over tiles and programs in order: bitwise repeatable
    """
    gain = tl.load(constants_ptr + GAIN)
    count = divisor.to(tl.float64)
    factor, power = in_two(tl.load(constants_ptr + SCALE).to(tl.float64) / (gain.to(tl.float64) * count))
    block, blocks = tl.program_id(0), tl.cdiv(rows, BLOCK)
    if SUMS:
        block -= 1
    if block < 0:
        loss = total_of(part_ptr, 0, parts, PARTS) / count
        tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))
        if SCALARS:
            part_ptr += parts.to(tl.int64)
            d_scale = total_of(part_ptr, 0, tile_parts, PARTS) / gain.to(tl.float64)
            d_scale += total_of(part_ptr, tile_parts, parts, PARTS)
            tl.store(grad_ptr, (d_scale / count).to(grad_ptr.dtype.element_ty))
            part_ptr += parts.to(tl.int64)
            tl.store(grad_ptr + 1, (total_of(part_ptr, 0, parts, PARTS) / count).to(grad_ptr.dtype.element_ty))
    elif block < blocks:
        finish_rows(
            row, col, i0, block * BLOCK, rows, M, N, D, offset, gain, factor, power, True, True, BLOCK, BLOCK_D
        )  # fmt: skip
    else:
        first = (block - blocks) * BLOCK
        finish_rows(
            col, row, 0, first, N, N, M, D, -offset, gain, factor, power, True, True, BLOCK, BLOCK_D
        )  # fmt: skip
