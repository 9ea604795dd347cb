"""What the tile kernels share: where a tile lies, its dot products, which of its pairs count.

M, N, D: images, texts, features; i, j: their indices. A kernel sees a block of the logits: M, N and offsets count from
the block's first row and column, pointers carry the 64-bit base, and offsets inside a tile are 32-bit.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

# What the device decides about a problem, fp32
SCALE, BOUND, OFFSET2 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
REPAIR, GAIN = tl.constexpr(3), tl.constexpr(4)
CONSTANTS = 5

_GROUP = tl.constexpr(8)  # tile rows that share what L2 holds

INF = tl.constexpr(float("inf"))
LOG2E, LN2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2))


class Tile(NamedTuple):
    """Where a tile of logits lies in its block: numbers on the device."""

    m: Any  # tile row
    n: Any  # tile column
    i0: Any  # first row
    j0: Any  # first column
    M: Any  # rows of the block
    N: Any  # columns of the block
    offset: Any  # row i's own column is i + offset


@triton.jit
def tiles_of(M, N, CONFIG: tl.constexpr):
    """Number of tiles of a block."""
    return tl.cdiv(M, CONFIG.BLOCK_M) * tl.cdiv(N, CONFIG.BLOCK_N)


@triton.jit
def tile_at(number, M, N, offset, CONFIG: tl.constexpr):
    """The `Tile` of a number: groups of _GROUP tile rows are walked column by column, for L2."""
    tiles_m, tiles_n = tl.cdiv(M, CONFIG.BLOCK_M), tl.cdiv(N, CONFIG.BLOCK_N)
    group = number // (_GROUP * tiles_n)
    rows = tl.minimum(tiles_m - group * _GROUP, _GROUP)
    in_group = number - group * (_GROUP * tiles_n)
    m, n = group * _GROUP + in_group % rows, in_group // rows
    return Tile(m, n, m * CONFIG.BLOCK_M, n * CONFIG.BLOCK_N, M, N, offset)


@triton.jit
def dot_tile(image, text, tile, D, CONFIG: tl.constexpr):
    """<image_i, text_j> of a tile (BLOCK_M, BLOCK_N) in fp32; rows and columns beyond M and N hold anything.

    image (M, D), text (N, D): a `Matrix`, or with DESCRIPTOR a tensor descriptor.
    """
    # Triton 3.6 takes no attributes into a shape
    BLOCK_M: tl.constexpr = CONFIG.BLOCK_M
    BLOCK_N: tl.constexpr = CONFIG.BLOCK_N
    dot = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    i0, j0 = tile.i0, tile.j0
    if CONFIG.DESCRIPTOR:
        for k in range(0, D, CONFIG.BLOCK_K):
            dot = tl.dot(image.load([i0, k]), tl.trans(text.load([j0, k])), dot, input_precision=CONFIG.PRECISION)
    else:
        depth = tl.arange(0, CONFIG.BLOCK_K)
        # rows past the last are read as the last: no mask in the loop
        i = tl.minimum(tl.arange(0, BLOCK_M), tile.M - i0 - 1)
        j = tl.minimum(tl.arange(0, BLOCK_N), tile.N - j0 - 1)
        image_ptrs = image.ptr + i0.to(tl.int64) * image.row_stride + (i[:, None] * image.row_stride + depth[None, :])
        text_ptrs = text.ptr + j0.to(tl.int64) * text.row_stride + (j[None, :] * text.row_stride + depth[:, None])
        for k in range(0, D, CONFIG.BLOCK_K):
            if CONFIG.EVEN_K:
                a, b = tl.load(image_ptrs), tl.load(text_ptrs)
            else:
                a = tl.load(image_ptrs, mask=depth[None, :] < D - k, other=0.0)
                b = tl.load(text_ptrs, mask=depth[:, None] < D - k, other=0.0)
            dot = tl.dot(a, b, dot, input_precision=CONFIG.PRECISION)
            image_ptrs += CONFIG.BLOCK_K
            text_ptrs += CONFIG.BLOCK_K
    return dot


@triton.jit
def halves(x):
    """Left and right half of a tile: an epilogue in parts needs registers for one part's temporaries, not for all."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def on_diagonal(i, j, i0, j0, offset):
    """Which pairs (i0 + i, j0 + j) are a row's own, which lie on the diagonal of the problem."""
    return j[None, :] - i[:, None] == i0 + offset - j0


@triton.jit
def needs_mask(i0, j0, N, offset, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether a tile has own pairs or columns beyond N; rows beyond M are masked by their vectors."""
    first = i0 + offset - j0  # own column of the first row
    return ((first > -BLOCK_M) & (first < BLOCK_N)) | (N - j0 < BLOCK_N)


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
def store_tile(out, i0, j0, x, DESCRIPTOR: tl.constexpr):
    """Stores a tile in a matrix padded to whole tiles, in its dtype: a `Matrix`, or a tensor descriptor."""
    if DESCRIPTOR:
        out.store([i0, j0], x.to(out.dtype))
    else:
        i, j = tl.arange(0, x.shape[0])[:, None], tl.arange(0, x.shape[1])[None, :]
        out_ptrs = out.ptr + i0.to(tl.int64) * out.row_stride + j0 + (i * out.row_stride + j)
        tl.store(out_ptrs, x.to(out.ptr.dtype.element_ty))


@triton.jit
def softplus(t):
    """log(1 + exp t) and its derivative in fp64, to the last digits of a small one."""
    u = tl.exp2(-tl.abs(t) * LOG2E)
    above = 1.0 + u
    # log(above) / (above - 1) changes slowly: at u it is what it is at the rounded one
    rounded = above - 1.0
    log1p = tl.where(rounded == 0.0, u, u * (tl.log(above) / tl.where(rounded == 0.0, 1.0, rounded)))
    return tl.where(t > 0, t, 0.0) + log1p, tl.where(t >= 0, 1.0, u) / above
