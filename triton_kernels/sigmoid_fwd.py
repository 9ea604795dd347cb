"""The sigmoid loss with its gradients in one pass over the logits; see the reference's `sigmoid_fwd`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastclip.triton_kernels.features import Features, high_bit, norms
from fastclip.triton_kernels.gradients import FACTOR, OWN, Gradients, store_factors
from fastclip.triton_kernels.launch import Tiles, cdiv, choose, launch, output_argument, tile_arguments
from fastclip.triton_kernels.tile import (
    BOUND,
    GAIN,
    LOG2E,
    SCALE,
    dot_tile,
    halves,
    load_vector,
    store_tile,
    tile_position,
)
from torch import Tensor

__all__ = ["sigmoid_fwd"]

_BLOCK = 1024  # rows of a program of the vectors' kernel


@triton.jit
def _log1p_of_small(t):
    """log(1 + t) for t in [0, 1] as t P(t), relative error 2e-7: log would lose all digits of a solved pair."""
    p = tl.fma(tl.full(t.shape, 0.00523268431, tl.float32), t, -0.0295051988)
    p = tl.fma(p, t, 0.0782258883)
    p = tl.fma(p, t, -0.136632398)
    p = tl.fma(p, t, 0.191060036)
    p = tl.fma(p, t, -0.24842982)
    p = tl.fma(p, t, 0.333190978)
    p = tl.fma(p, t, -0.499994934)
    return t * tl.fma(p, t, 0.99999994)


@triton.jit(do_not_specialize=["size", "other_size", "offset", "parts", "first"])
def sigmoid_vectors_kernel(
    pos_ptr,  # (size,) fp64: the own pair's logit, without the bias
    inv_ptr,  # (size,) fp32
    factor_ptr,  # (size,) fp32
    vec_ptr,  # (planes, size): FACTOR, OWN, OUT, PROJECT
    constants_ptr,
    bias_ptr,
    part_ptr,  # (3, parts) fp64: loss, d_scale, d_bias; from `first`, not written without SUMS
    size,
    other_size,
    offset,
    parts,
    first,
    NORMALIZE: tl.constexpr,
    HALF: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The vectors of one side, and the own pairs' share of the loss and of d_bias.

    Math      x = -(z + b): loss softplus(x), weight -gain sigmoid(x);  gain = 2^k with 2^14 > gain |G| everywhere
              for fp16 features, from the bound on the logits: also a solved batch's weights are fp16 numbers; else 1
    Program   BLOCK rows
    Precision fp64
    """
    bias = tl.load(bias_ptr).to(tl.float64)
    bound = tl.load(constants_ptr + BOUND).to(tl.float64)
    gain = bound * 0.0 + 1.0
    if HALF:
        gain = 4096.0 / high_bit(tl.exp(tl.minimum(tl.maximum(bound + bias, -70.0), 0.0)))
    if tl.program_id(0) == 0:
        tl.store(constants_ptr + GAIN, gain.to(tl.float32))
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    some = k < size
    plane = size.to(tl.int64)
    scale = tl.load(constants_ptr + SCALE)
    store_factors(vec_ptr + k, plane, inv_ptr + k, factor_ptr + k, scale, gain, some, NORMALIZE)
    has = some & (k + offset >= 0) & (k + offset < other_size)
    x = -(tl.load(pos_ptr + k, mask=some, other=0.0) + bias)
    t = tl.exp(-tl.abs(x))
    sigmoid = tl.where(has, tl.where(x >= 0, 1.0, t) / (1.0 + t), 0.0)
    tl.store(vec_ptr + OWN * plane + k, (-gain * sigmoid).to(tl.float32), mask=some)
    if SUMS:
        above = 1.0 + t
        log1p = tl.where(above == 1.0, t, tl.log(above) * (t / tl.where(above == 1.0, 1.0, above - 1.0)))
        loss = tl.where(has, tl.where(x > 0, x, 0.0) + log1p + 0.0 * x, 0.0)
        at = first + tl.program_id(0)
        tl.store(part_ptr + at, tl.sum(loss, 0))
        tl.store(part_ptr + 2 * parts.to(tl.int64) + at, -tl.sum(sigmoid, 0))


@triton.jit
def _pairs(
    dot, row_vec_ptr, col_vec_ptr, constants_ptr, bias_ptr, weights, weights_row_stride, i0, j0, M, N, offset,
    GRADIENTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Stores the weights of dot products (BLOCK_M, BLOCK_N) from (i0, j0) on; returns their rows' share of loss,
    d_scale and d_bias."""
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    row_factor = load_vector(row_vec_ptr, i0, i, M)
    col_factor = load_vector(col_vec_ptr, j0, j, N)[None, :]
    scale = tl.load(constants_ptr + SCALE).to(tl.float64)
    row_scale = (row_factor.to(tl.float64) * scale).to(tl.float32)[:, None]
    inside = (i < M - i0)[:, None] & (j < N - j0)[None, :] & (j[None, :] - i[:, None] != i0 + offset - j0)
    x = dot * col_factor
    bias = tl.full(x.shape, 0.0, tl.float32) + tl.load(bias_ptr).to(tl.float32)
    x = tl.fma(x, tl.broadcast_to(row_scale, x.shape), bias)
    t = tl.exp2(-tl.abs(x) * LOG2E)
    loss = tl.sum(tl.where(inside, tl.where(x > 0, x, 0.0) + _log1p_of_small(t), 0.0), 1)
    if GRADIENTS:
        g = tl.where(inside, tl.where(x >= 0, 1.0, t) / (1.0 + t), 0.0)
        d_bias = tl.sum(g, 1)
        g *= (row_factor * tl.load(constants_ptr + GAIN))[:, None] * col_factor
        store_tile(weights, weights_row_stride, i0, j0, g, BLOCK_M, BLOCK_N, DESCRIPTOR)
        return loss, tl.sum(g * dot, 1), d_bias
    else:
        return loss, loss, loss


@triton.jit
def _pairs_split(
    dot, row_vec_ptr, col_vec_ptr, constants_ptr, bias_ptr, weights, weights_row_stride, i0, j0, M, N, offset,
    GRADIENTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DESCRIPTOR: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """The same in SPLIT parts one after the other."""
    if SPLIT == 1:
        return _pairs(
            dot, row_vec_ptr, col_vec_ptr, constants_ptr, bias_ptr, weights, weights_row_stride, i0, j0, M, N, offset,
            GRADIENTS, BLOCK_M, BLOCK_N, DESCRIPTOR,
        )  # fmt: skip
    else:
        left, right = halves(dot, BLOCK_M, BLOCK_N)
        loss, d_scale, d_bias = _pairs_split(
            left, row_vec_ptr, col_vec_ptr, constants_ptr, bias_ptr, weights, weights_row_stride, i0, j0, M, N, offset,
            GRADIENTS, BLOCK_M, BLOCK_N // 2, DESCRIPTOR, SPLIT // 2,
        )  # fmt: skip
        more_loss, more_d_scale, more_d_bias = _pairs_split(
            right, row_vec_ptr, col_vec_ptr, constants_ptr, bias_ptr, weights, weights_row_stride, i0,
            j0 + BLOCK_N // 2, M, N, offset, GRADIENTS, BLOCK_M, BLOCK_N // 2, DESCRIPTOR, SPLIT // 2,
        )  # fmt: skip
        return loss + more_loss, d_scale + more_d_scale, d_bias + more_d_bias


@triton.jit(do_not_specialize=["parts", "M", "N", "offset"])
def sigmoid_fwd_kernel(
    image,  # (M, D), a pointer or a tensor descriptor
    text,  # (N, D)
    image_row_stride,
    text_row_stride,
    row_vec_ptr,  # (M,) fp32: FACTOR
    col_vec_ptr,  # (N,) fp32
    constants_ptr,
    bias_ptr,
    weights,  # (M, N) padded to whole tiles, in the features' dtype; not written without GRADIENTS
    weights_row_stride,
    part_ptr,  # (3, parts) fp64: loss, d_scale, d_bias of every tile
    parts,
    M,
    N,
    D,
    offset,
    GRADIENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr = 1,
):
    """Losses of a block of pairs and the weights r_i G_ij c_j of their gradients; the logits are never stored.

    Math      x = z + b, t = exp(-abs(x)): loss max(x, 0) + log1p(t), G = sigmoid(x) = (x >= 0 ? 1 : t) / (1 + t);
              own pairs 0: they are added from their fp64 logits, and in the finish
    Program   one (BLOCK_M, BLOCK_N) tile, in groups of tile rows that reuse L2
    Traffic   reads image and text once per tile column and row, writes the weights once
    Precision products in the input dtype, the rest in fp32; weights rounded once to the features' dtype
    Ragged    rows >= M and columns >= N are left out of the sums
    Order     partial sums of every tile: bitwise repeatable
    """
    tile = tl.program_id(0)
    m, n = tile_position(tile, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    i0, j0 = m * BLOCK_M, n * BLOCK_N
    dot = dot_tile(
        image, text, image_row_stride, text_row_stride, i0, j0, M, N, D,
        BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTOR, EVEN_K, PRECISION,
    )  # fmt: skip
    loss, d_scale, d_bias = _pairs_split(
        dot, row_vec_ptr, col_vec_ptr, constants_ptr, bias_ptr, weights, weights_row_stride, i0, j0, M, N, offset,
        GRADIENTS, BLOCK_M, BLOCK_N, DESCRIPTOR, SPLIT,
    )  # fmt: skip
    plane = parts.to(tl.int64)
    tl.store(part_ptr + tile, tl.sum(loss, 0).to(tl.float64))
    if GRADIENTS:
        tl.store(part_ptr + plane + tile, tl.sum(d_scale, 0).to(tl.float64))
        tl.store(part_ptr + 2 * plane + tile, tl.sum(d_bias, 0).to(tl.float64))


def sigmoid_fwd(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    offset: int,
    normalize: bool,
    bias: Tensor,
    divisor: int,
    needs: list[bool],
    saved_dtype: torch.dtype,
    tiles: Tiles | None = None,
) -> tuple[Tensor | None, ...]:
    """As the reference's `sigmoid_fwd`: 6 M N D operations with gradients of the features, 2 without. `tiles`: other
    kernels for the pairs."""
    n = norms(image, text, scale, offset, normalize, False)
    rows, cols = Features.of(image, n.row_inv, normalize), Features.of(text, n.col_inv, normalize)
    M, N, D = len(image), len(text), image.shape[1]
    gradients = Gradients(rows, cols, D)
    tile = choose("sigmoid_fwd", rows.x, False)
    if tiles:
        tile = tiles.config("sigmoid_fwd", *gradients.block, False)
    tile_parts = gradients.count_tiles(tile)
    parts = tile_parts + max(gradients.finish_parts, cdiv(M, _BLOCK))
    part = image.new_zeros(3, parts, dtype=torch.float64)
    row_vec, col_vec = (image.new_empty(4, size, dtype=torch.float32) for size in (M, N))
    for pos, inv, factor, vec, size, other, shift in (
        (n.row_pos, n.row_inv, rows.factor, row_vec, M, N, offset),
        (n.col_pos, n.col_inv, cols.factor, col_vec, N, M, -offset),
    ):
        launch(
            sigmoid_vectors_kernel,
            cdiv(size, _BLOCK),
            *(pos, inv, factor, vec, n.constants, bias, part, size, other, shift, parts, tile_parts),
            NORMALIZE=normalize,
            HALF=image.dtype == torch.float16,
            SUMS=vec is row_vec,
            BLOCK=_BLOCK,
        )
    done = 0

    def weigh(i0: int, i1: int, j0: int, j1: int, weights: Tensor) -> None:
        nonlocal done
        x, y = rows.x[i0:i1], cols.x[j0:j1]
        if tiles:
            factors = row_vec[FACTOR.value, i0:], col_vec[FACTOR.value, j0:]
            at = offset + i0 - j0
            tiles.sigmoid_fwd(
                tile, x, y, *factors, n.constants, at, bias, weights if any(needs) else None, part[:, done:]
            )
        else:
            operands, options = tile_arguments(tile, x, y)
            launch(
                sigmoid_fwd_kernel,
                cdiv(i1 - i0, tile.BLOCK_M) * cdiv(j1 - j0, tile.BLOCK_N),
                *(*operands, row_vec[:, i0:], col_vec[:, j0:], n.constants, bias),
                *(output_argument(tile, weights, x), weights.stride(0), part[:, done:], parts),
                *(i1 - i0, j1 - j0, x.shape[1], offset + i0 - j0),
                GRADIENTS=any(needs),
                **options,
            )
        done += gradients.tiles(i1 - i0, j1 - j0, tile)

    d_image, d_text = (
        torch.empty(x.shape, dtype=saved_dtype, device=x.device) if need else None
        for x, need in zip((image, text), needs)
    )
    own = offset if any(needs[:3]) else None
    gradients.compute(weigh, row_vec, col_vec, own, part[1, tile_parts:], d_image, d_text, 1.0 / divisor, any(needs))
    loss, d_scale, d_bias = part.sum(1) / divisor
    return (
        loss,
        d_image,
        d_text,
        (d_scale / n.constants[GAIN.value]).to(scale.dtype) if needs[2] else None,
        d_bias.to(bias.dtype) if needs[3] else None,
    )
