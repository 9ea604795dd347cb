"""What the tile kernels share: where a tile lies, its dot products, which of its pairs count.

M, N, D: images, texts, features; i, j: their indices. A kernel sees a block of the logits: M, N and offsets count from
the block's first row and column, pointers carry the 64-bit base, and offsets inside a tile are 32-bit.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

# What the device decides about a problem, fp32
SCALE, BOUND, OFFSET2 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
REPAIR, GAIN = tl.constexpr(3), tl.constexpr(4)
CONSTANTS = 5

INF = tl.constexpr(float("inf"))
LOG2E, LN2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2))


@triton.jit
def tile_position(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Number of the tile row and of the tile column: groups of GROUP tile rows are walked column by column, for L2."""
    group = tile // (GROUP * tiles_n)
    rows = tl.minimum(tiles_m - group * GROUP, GROUP)
    inside = tile - group * (GROUP * tiles_n)
    return group * GROUP + inside % rows, inside // rows


@triton.jit
def dot_tile(
    image,  # (M, D), a pointer or a tensor descriptor
    text,  # (N, D)
    image_row_stride,
    text_row_stride,
    i0,
    j0,
    M,
    N,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """<image_i, text_j> of a tile (BLOCK_M, BLOCK_N) in fp32; rows and columns beyond M and N hold anything."""
    dot = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DESCRIPTOR:
        for k in range(0, D, BLOCK_K):
            dot = tl.dot(image.load([i0, k]), tl.trans(text.load([j0, k])), dot, input_precision=PRECISION)
    else:
        depth = tl.arange(0, BLOCK_K)
        # rows past the last are read as the last: no mask in the loop
        i, j = tl.minimum(tl.arange(0, BLOCK_M), M - i0 - 1), tl.minimum(tl.arange(0, BLOCK_N), N - j0 - 1)
        image_ptrs = image + i0.to(tl.int64) * image_row_stride + (i[:, None] * image_row_stride + depth[None, :])
        text_ptrs = text + j0.to(tl.int64) * text_row_stride + (j[None, :] * text_row_stride + depth[:, None])
        for k in range(0, D, BLOCK_K):
            if EVEN_K:
                a, b = tl.load(image_ptrs), tl.load(text_ptrs)
            else:
                a = tl.load(image_ptrs, mask=depth[None, :] < D - k, other=0.0)
                b = tl.load(text_ptrs, mask=depth[:, None] < D - k, other=0.0)
            dot = tl.dot(a, b, dot, input_precision=PRECISION)
            image_ptrs += BLOCK_K
            text_ptrs += BLOCK_K
    return dot


@triton.jit
def halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Left and right half of a tile: an epilogue in parts needs registers for one part's temporaries, not for all."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def load_vector(ptr, k0, k, size):
    """Elements k0 + k of a vector (size,); 0 beyond it."""
    return tl.load(ptr + k0 + k, mask=k < size - k0, other=0)


@triton.jit
def scaled(factor, constants_ptr):
    """factor s log2(e), rounded once, and what rounding took from it: an error of the scale shifts all logits alike."""
    exact = factor.to(tl.float64) * tl.load(constants_ptr + SCALE).to(tl.float64) * LOG2E
    rounded = exact.to(tl.float32)
    return rounded, tl.where(tl.abs(rounded) < INF, exact - rounded.to(tl.float64), 0.0).to(tl.float32)


@triton.jit
def exact_logits2(dot, col_factor, row_scale, row_rest):
    """log2(e) z, and what rounding took from it: what a repair needs, whose logits are thousands."""
    dot *= col_factor
    row_scale = tl.broadcast_to(row_scale[:, None], dot.shape)
    z2 = dot * row_scale
    rest2 = tl.fma(dot, row_scale, -z2) + dot * row_rest[:, None]
    return z2, tl.where(tl.abs(z2) < INF, rest2, 0.0)


@triton.jit
def store_tile(
    out, out_row_stride, i0, j0, tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DESCRIPTOR: tl.constexpr
):
    """A tile (BLOCK_M, BLOCK_N) into a matrix padded to whole tiles, in its dtype."""
    if DESCRIPTOR:
        out.store([i0, j0], tile.to(out.dtype))
    else:
        i, j = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
        out_ptrs = out + i0.to(tl.int64) * out_row_stride + j0 + (i * out_row_stride + j)
        tl.store(out_ptrs, tile.to(out.dtype.element_ty))


@triton.jit
def softplus(t):
    """log(1 + exp t) and its derivative in fp64, to the last digits of a small one."""
    u = tl.exp2(-tl.abs(t) * LOG2E)
    above = 1.0 + u
    # log(above) / (above - 1) changes slowly: at u it is what it is at the rounded one
    rounded = above - 1.0
    log1p = tl.where(rounded == 0.0, u, u * (tl.log(above) / tl.where(rounded == 0.0, 1.0, rounded)))
    return tl.where(t > 0, t, 0.0) + log1p, tl.where(t >= 0, 1.0, u) / above
