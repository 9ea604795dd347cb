"""Device code shared by the tile kernels: the position of a tile, its dot products and its masks.

M, N and D are the numbers of images, texts and features; i and j index images (rows) and texts (columns). A kernel
works on one block of the M x N logits: its M, N, i and j count from the block's first row and column. Pointers carry
the 64-bit start of a tile, so that the indices inside a tile stay 32-bit.

An exponential is computed as exp2 with log2(e) folded into the scale, because the GPU's exponential unit is base 2.
Names that end in 2 are in units of log 2, such as z2 = log2(e) z.

c is the number that is subtracted from every logit before the exponential (docs/mathematics.md). c2 = log2(e) c is the
constant OFFSET2, `offset2` in code. Without the 2, `offset` is that of the diagonal: row i meets it in column
i + offset. A column's factor c_j is another number still.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

# Indices into `constants_ptr` (fp32): values that kernels compute on the device, so that the host never waits for them.
# SCALE: the logit scale. BOUND: upper bound of all |logits|.
# OFFSET2: c2, which is subtracted from all z2 before the exponential.
# REPAIR: 1 if c may have lost terms and the problem must be computed again with row and column maxima.
# GAIN: the power of two that stored weights are multiplied by, so that they do not flush to zero in fp16.
SCALE, BOUND, OFFSET2 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
REPAIR, GAIN = tl.constexpr(3), tl.constexpr(4)
CONSTANTS = 5

_GROUP = tl.constexpr(8)  # tile rows that run together and reuse the same text tiles from L2

INF = tl.constexpr(float("inf"))
LOG2E, LN2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2))


class Tile(NamedTuple):
    """Position of a tile of logits in its block, as device integers."""

    m: Any  # tile row
    n: Any  # tile column
    i0: Any  # first row
    j0: Any  # first column
    M: Any  # rows of the block
    N: Any  # columns of the block
    offset: Any  # row i meets the diagonal of the problem in column i + offset


@triton.jit
def tiles_of(M, N, CONFIG: tl.constexpr):
    """Number of tiles in a block of (M, N) logits."""
    return tl.cdiv(M, CONFIG.BLOCK_M) * tl.cdiv(N, CONFIG.BLOCK_N)


@triton.jit
def tile_at(number, M, N, offset, CONFIG: tl.constexpr):
    """Return the `Tile` with this number.

    Tiles are numbered column by column within groups of _GROUP tile rows, so that programs which run at the same time
    read the same few tiles of image and text, which then stay in L2.
    """
    tiles_m, tiles_n = tl.cdiv(M, CONFIG.BLOCK_M), tl.cdiv(N, CONFIG.BLOCK_N)
    group = number // (_GROUP * tiles_n)
    rows = tl.minimum(tiles_m - group * _GROUP, _GROUP)
    in_group = number - group * (_GROUP * tiles_n)
    m, n = group * _GROUP + in_group % rows, in_group // rows
    return Tile(m, n, m * CONFIG.BLOCK_M, n * CONFIG.BLOCK_N, M, N, offset)


@triton.jit
def dot_tile(image, text, tile, D, CONFIG: tl.constexpr):
    """Dot products <image_i, text_j> of a tile, (BLOCK_M, BLOCK_N) fp32; entries beyond M and N are arbitrary.

    image (M, D) and text (N, D) are each a `Matrix`, or with DESCRIPTOR a tensor descriptor.
    """
    # Triton 3.6 rejects attributes such as CONFIG.BLOCK_M in a shape, hence the two locals
    BLOCK_M: tl.constexpr = CONFIG.BLOCK_M
    BLOCK_N: tl.constexpr = CONFIG.BLOCK_N
    dot = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    i0, j0 = tile.i0, tile.j0
    if CONFIG.DESCRIPTOR:
        for k in range(0, D, CONFIG.BLOCK_K):
            dot = tl.dot(image.load([i0, k]), tl.trans(text.load([j0, k])), dot, input_precision=CONFIG.PRECISION)
    else:
        depth = tl.arange(0, CONFIG.BLOCK_K)
        # Rows past the last one read the last one again, which saves a mask per load; the caller masks the results
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
    """Return the left and the right half of a tile.

    An epilogue that works on one half after the other needs registers for the temporaries of one half only.
    """
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def on_diagonal(i, j, i0, j0, offset):
    """Mask of the pairs (i0 + i, j0 + j) on the diagonal of the problem, where column = row + offset."""
    return j[None, :] - i[:, None] == i0 + offset - j0


@triton.jit
def needs_mask(i0, j0, N, offset, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return True if a tile has diagonal pairs or columns beyond N.

    Rows beyond M need no mask here: their vectors already give them the weight 0.
    """
    first = i0 + offset - j0  # where the tile's first row meets the diagonal, counted from the tile's first column
    return ((first > -BLOCK_M) & (first < BLOCK_N)) | (N - j0 < BLOCK_N)


@triton.jit
def load_vector(ptr, k0, k, size):
    """Load elements k0 + k of a vector (size,); 0 beyond its end."""
    return tl.load(ptr + k0 + k, mask=k < size - k0, other=0)


@triton.jit
def scaled(factor, constants_ptr):
    """Return factor s log2(e) in fp32 and its rounding error.

    The product is formed in fp64 and rounded once, because an error in it would shift all logits of a row together.
    """
    exact = factor.to(tl.float64) * tl.load(constants_ptr + SCALE).to(tl.float64) * LOG2E
    rounded = exact.to(tl.float32)
    return rounded, tl.where(tl.abs(rounded) < INF, exact - rounded.to(tl.float64), 0.0).to(tl.float32)


@triton.jit
def exact_logits2(dot, col_factor, row_scale, row_rest):
    """Return z2 = log2(e) z in fp32 and its rounding error.

    A repair needs both: its logits may be in the thousands, where one fp32 rounding changes an exponential visibly.
    """
    dot *= col_factor
    row_scale = tl.broadcast_to(row_scale[:, None], dot.shape)
    z2 = dot * row_scale
    rest2 = tl.fma(dot, row_scale, -z2) + dot * row_rest[:, None]
    return z2, tl.where(tl.abs(z2) < INF, rest2, 0.0)


@triton.jit
def store_tile(out, i0, j0, x, DESCRIPTOR: tl.constexpr):
    """Store a tile in `out`, a `Matrix` or tensor descriptor padded to whole tiles, cast to the dtype of `out`."""
    if DESCRIPTOR:
        out.store([i0, j0], x.to(out.dtype))
    else:
        i, j = tl.arange(0, x.shape[0])[:, None], tl.arange(0, x.shape[1])[None, :]
        out_ptrs = out.ptr + i0.to(tl.int64) * out.row_stride + j0 + (i * out.row_stride + j)
        tl.store(out_ptrs, x.to(out.ptr.dtype.element_ty))


@triton.jit
def softplus(t):
    """Return log(1 + exp t) and its derivative in fp64, with full relative precision also where both are tiny."""
    u = tl.exp2(-tl.abs(t) * LOG2E)
    above = 1.0 + u
    # Kahan's log1p: log(w) / (w - 1) changes slowly, so its value at the rounded w = 1 + u also holds at the exact one
    rounded = above - 1.0
    log1p = tl.where(rounded == 0.0, u, u * (tl.log(above) / tl.where(rounded == 0.0, 1.0, rounded)))
    return tl.where(t > 0, t, 0.0) + log1p, tl.where(t >= 0, 1.0, u) / above
