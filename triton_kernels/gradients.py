"""From weights to gradients: blocks of stored weights, the library's products with the features, and the finish.

The vectors of one side, fp32 (planes, size), are what the tile kernels and the finish need of each row; labels lie
among them as int32 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastclip.triton_kernels.features import EPS, Features, high_bit
from fastclip.triton_kernels.launch import Config, addmm, cdiv, chunks, launch, processors, workspace_bytes
from torch import Tensor

__all__ = [
    "ALIGNMENT",
    "FACTOR",
    "OUT",
    "OWN",
    "PROJECT",
    "FinishSide",
    "Gradients",
    "block_size",
    "finish_rows",
    "in_two",
    "store_factors",
    "store_side",
    "total_of",
]

# Planes: what a dot product is multiplied with; of the own pair the weight; of the result the factor, and whether it
# is projected (1, or 0 where the norm is a constant)
FACTOR, OWN, OUT, PROJECT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)

ALIGNMENT = 128  # every tile divides it: a block of weights padded to it is written without masks
TINY = tl.constexpr(2.0**-100)
_LONGEST_SUM = 65536  # terms in one chain of additions: tensor cores truncate
_ROWS, _COLUMNS = 4, 256  # of a program of the finish, at a time


@triton.jit
def _projected(inv, NORMALIZE: tl.constexpr):
    """1 where a gradient is projected, 0 where the norm was clamped, or nothing is normalised: it is a constant."""
    project = tl.zeros_like(inv)
    if NORMALIZE:
        project = tl.where(inv * EPS < 1.0, 1.0, project)
    return project


@triton.jit
def store_factors(vec_ptrs, plane, inv_ptrs, factor_ptrs, scale, gain, some, NORMALIZE: tl.constexpr):
    """FACTOR, OUT and PROJECT of some rows, from their inverse norms and factors; gain is undone by OUT."""
    inv = tl.load(inv_ptrs, mask=some, other=0.0)
    factor = tl.load(factor_ptrs, mask=some, other=1.0)
    tl.store(vec_ptrs + FACTOR * plane, factor, mask=some)
    out = scale.to(tl.float64) * (inv.to(tl.float64) / factor.to(tl.float64)) / gain
    tl.store(vec_ptrs + OUT * plane, out.to(tl.float32), mask=some)
    tl.store(vec_ptrs + PROJECT * plane, _projected(inv, NORMALIZE), mask=some)


@triton.jit
def store_side(vec_ptrs, plane, inv, some, NORMALIZE: tl.constexpr, COPY: tl.constexpr):
    """FACTOR, OUT and PROJECT of some rows from their inverse norms, without scale and gain, which the finish knows.

    COPY: the products see the rows times OUT.
    """
    factor, power = inv, tl.full(inv.shape, 1.0, tl.float32)
    if COPY:
        wide = high_bit(inv.to(tl.float64))
        factor, power = (inv.to(tl.float64) / wide).to(tl.float32), wide.to(tl.float32)
    tl.store(vec_ptrs + FACTOR * plane, factor, mask=some)
    tl.store(vec_ptrs + OUT * plane, power, mask=some)
    tl.store(vec_ptrs + PROJECT * plane, _projected(inv, NORMALIZE), mask=some)


@triton.jit
def total_of(part_ptr, first, last, BLOCK: tl.constexpr):
    """Sum of the parts from `first` to before `last`, fp64, in a fixed order."""
    k = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for k0 in range(first, last, BLOCK):
        total += tl.load(part_ptr + k0 + k, mask=k0 + k < last, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def in_two(factor):
    """A fp64 factor in two, each of which fp32 holds without loss of digits: a mean's may be tiny, a scaler's too."""
    power = tl.where(tl.abs(factor) < TINY, TINY, 1.0).to(tl.float32)
    return (factor / power).to(tl.float32), power


@triton.jit
def finish_rows(
    side, other, raw_row_stride, x_row_stride, other_row_stride, k0, l0, size, plane, other_plane, D, offset, own_gain,
    factor, power, HAS_OWN: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows l0 and on of the `size` that `side.raw` has, which are the side's from k0 on; their share of d_scale.

    Their own pairs' weights are multiplied by `own_gain`, they themselves by `factor` and then by `power`.
    """
    rows = l0 + tl.arange(0, BLOCK)
    some = rows < size
    k = k0 + rows
    own = k + offset
    has = some & (own >= 0) & (own < other_plane)
    own = tl.where(has, own, 0)
    weight = tl.zeros((BLOCK,), tl.float32)
    if HAS_OWN:
        weight = tl.load(side.vec + OWN * plane + k, mask=some, other=0.0) * own_gain
        weight *= tl.load(side.vec + FACTOR * plane + k, mask=some, other=0.0)
        weight *= tl.load(other.vec + FACTOR * other_plane + own, mask=has, other=0.0)
    raw_ptrs = side.raw + rows.to(tl.int64)[:, None] * raw_row_stride
    x_ptrs = side.x + k.to(tl.int64)[:, None] * x_row_stride
    other_ptrs = other.x + own.to(tl.int64)[:, None] * other_row_stride
    along, dot, squares = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)[None, :]
        x = tl.load(x_ptrs + d, mask=some[:, None] & (d < D), other=0.0).to(tl.float32)
        g = tl.zeros_like(x)
        if WRITE:
            g = tl.load(raw_ptrs + d, mask=some[:, None] & (d < D), other=0.0)
        if HAS_OWN:
            y = tl.load(other_ptrs + d, mask=has[:, None] & (d < D), other=0.0).to(tl.float32)
            dot += tl.sum(x * y, 1)
            g += weight[:, None] * y
        along += tl.sum(x * g, 1)
        squares += tl.sum(x * x, 1)
    if WRITE:
        # <u, g> u from these very rows: the rounded inverse norm would leave more of g along u
        project = tl.load(side.vec + PROJECT * plane + k, mask=some, other=0.0)
        along = tl.where(project != 0, along / tl.where(project != 0, squares, 1.0), 0.0)
        factor *= tl.load(side.vec + OUT * plane + k, mask=some, other=0.0)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)[None, :]
            x = tl.load(x_ptrs + d, mask=some[:, None] & (d < D), other=0.0).to(tl.float32)
            g = tl.load(raw_ptrs + d, mask=some[:, None] & (d < D), other=0.0)
            if HAS_OWN:
                g += weight[:, None] * tl.load(other_ptrs + d, mask=has[:, None] & (d < D), other=0.0).to(tl.float32)
            g = factor[:, None] * (g - along[:, None] * x) * power
            out_ptrs = side.out + k.to(tl.int64)[:, None] * D + d
            tl.store(out_ptrs, g.to(side.out.dtype.element_ty), mask=some[:, None] & (d < D))
    return tl.sum(weight * dot, 0)


@triton.jit(do_not_specialize=["i0", "rows", "M", "N", "offset"])
def finish_kernel(
    row,  # a `FinishSide`; raw (rows, raw_row_stride) is of the images from i0 on
    col,
    raw_row_stride,
    image_row_stride,
    text_row_stride,
    part_ptr,  # (programs of images,): their share of d_scale; written with HAS_OWN
    i0,
    rows,
    M,
    N,
    D,
    offset,
    HAS_OWN: tl.constexpr,
    WRITE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds the own pairs to the sums of the others, projects, scales and casts.

    Math      g_k = raw_k + own_k r_k c_j other_j, j = k + offset;  out = s (g - u <u, g>) r_k / (what raw has of it)
    Program   BLOCK of `rows` images, or after them of all texts; twice over D
    Traffic   reads raw, x, other twice, writes out
    Precision fp32; the own pair's weight, the largest of a row, was never rounded to the features' dtype
    Ragged    rows beyond the last and the D tail load as 0
    Order     one program a row: bitwise repeatable
    """
    block, blocks = tl.program_id(0), tl.cdiv(rows, BLOCK)
    if block < blocks:
        d_scale = finish_rows(
            row, col, raw_row_stride, image_row_stride, text_row_stride, i0, block * BLOCK, rows, M, N, D, offset,
            1.0, 1.0, 1.0, HAS_OWN, WRITE_ROWS, BLOCK, BLOCK_D,
        )  # fmt: skip
        if HAS_OWN:
            tl.store(part_ptr + block, d_scale)
    else:
        finish_rows(
            col, row, raw_row_stride, text_row_stride, image_row_stride, 0, (block - blocks) * BLOCK, N, N, M, D,
            -offset, 1.0, 1.0, 1.0, HAS_OWN, True, BLOCK, BLOCK_D,
        )  # fmt: skip


class FinishSide(NamedTuple):
    """One side of the finish."""

    raw: Tensor  # (rows, raw_row_stride) fp32: sum_j G_kj r_k c_j other_j
    x: Tensor  # (size, D)
    vec: Tensor  # (planes, size): FACTOR, OWN, OUT, PROJECT
    out: Tensor  # (size, D)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def block_size(x: Tensor, M: int, N: int, D: int) -> tuple[int, int]:
    """Rows and columns, whole tiles, of the blocks of weights for features like `x`: each fits into the workspace."""
    weights = workspace_bytes() // x.element_size()
    # The product with the texts fills whole waves of processors with its tiles of 128 x 256
    wave = max(processors(x.device) // -(-D // 256), 1) * ALIGNMENT
    # Columns are cut where not nearly a wave of rows would fit: idle processors cost more than one more addition to the
    # sums of a block's images
    fit = min(weights // _padded(min(wave - wave // 8, M)), _LONGEST_SUM)
    most = max(fit // ALIGNMENT, 1) * ALIGNMENT
    block_n = _padded(-(-N // -(-N // most)))
    rows = min(weights // block_n, _LONGEST_SUM)
    rows = rows // wave * wave or rows // ALIGNMENT * ALIGNMENT
    return min(_padded(M), max(rows, ALIGNMENT)), block_n


class Gradients:
    """A problem cut into blocks of weights that fit into the workspace."""

    def __init__(self, image: Features, text: Features, D: int) -> None:
        self.image, self.text, self.D = image, text, D
        self.M, self.N = len(image.x), len(text.x)
        self.block_m, self.block_n = block_size(image.x, self.M, self.N, D)

    @staticmethod
    def tiles(rows: int, columns: int, *kinds: Config) -> int:
        """Tiles of a block, of the kind that has most of them; a multiple of 4, so that every block's start aligned."""
        return max(-(-rows // kind.BLOCK_M) * -(-columns // kind.BLOCK_N) + 3 & ~3 for kind in kinds)

    def count_tiles(self, *kinds: Config) -> int:
        rows, columns = chunks(self.M, self.block_m), chunks(self.N, self.block_n)
        return sum(self.tiles(i1 - i0, j1 - j0, *kinds) for i0, i1 in rows for j0, j1 in columns)

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of the largest block."""
        return min(self.block_m, self.M), min(self.block_n, self.N)

    @property
    def finish_parts(self) -> int:
        return -(-self.M // _ROWS)

    def compute(
        self,
        weigh: Callable[[int, int, int, int, Tensor], None],
        row_vec: Tensor,
        col_vec: Tensor,
        offset: int | None,
        scale_part: Tensor,
        d_image: Tensor | None,
        d_text: Tensor | None,
    ) -> None:
        """d_image (M, D), d_text (N, D) from the weights r_i G_ij c_j that ``weigh(i0, i1, j0, j1,
        weights)`` stores.

        offset: of the own pairs, whose weights are in the vectors and not among the stored; None when there are none.
        scale_part (finish_parts,): the own pairs' share of d_scale.
        """
        x = self.image.x
        weights = x.new_empty(self.block_m, self.block_n)
        raw_text = None if d_text is None else x.new_empty(self.N, x.shape[1], dtype=torch.float32)
        raw_image = x.new_empty(0 if d_image is None else self.block_m, x.shape[1], dtype=torch.float32)
        row = FinishSide(raw_image, x, row_vec, raw_image if d_image is None else d_image)
        col = FinishSide(*(raw_image, self.text.x, col_vec, raw_image))
        if raw_text is not None and d_text is not None:
            col = col._replace(raw=raw_text, out=d_text)
        for i0, i1 in chunks(self.M, self.block_m):
            for j0, j1 in chunks(self.N, self.block_n):
                weigh(i0, i1, j0, j1, weights)
                block = weights[: i1 - i0, : j1 - j0]
                if d_image is not None:
                    addmm(raw_image[: i1 - i0], block, self.text.x[j0:j1], keep=j0 > 0)
                if raw_text is not None:
                    addmm(raw_text[j0:j1], block.T, x[i0:i1], keep=i0 > 0)
            rows = i1 - i0 if d_image is not None or offset is not None else 0
            cols = self.N if d_text is not None and i1 == self.M else 0  # the last chunk completes the texts
            if rows or cols:
                launch(
                    finish_kernel,
                    cdiv(rows, _ROWS) + cdiv(cols, _ROWS),
                    *(row, col, raw_image.stride(0), x.stride(0), self.text.x.stride(0), scale_part[i0 // _ROWS :]),
                    *(i0, rows, self.M, self.N, self.D, offset or 0),
                    HAS_OWN=offset is not None,
                    WRITE_ROWS=d_image is not None,
                    BLOCK=_ROWS,
                    BLOCK_D=_COLUMNS,
                )
