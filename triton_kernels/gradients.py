"""Gradients from weights: blocks of stored weights, the library's products with the features, and the finish kernel.

The weights r_i G_ij c_j of a block are needed twice: their rows sum to d_image, their columns to d_text. A fused kernel
could keep one of the two sums on chip, but would need float atomics, whose order varies, for the other. The block is
therefore stored once, and two library GEMMs read it. Positives on the diagonal are not in the block: the finish adds
them in fp32, because they are the largest weights of a row and would lose the most if rounded to 16 bits.

The vectors of one side, fp32 (planes, size), hold what the tile kernels and the finish need for each row. The plane
of the labels holds the bits of int32 numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastclip.triton_kernels.features import EPS, Features, without_power
from fastclip.triton_kernels.launch import Config, Matrix, addmm, chunks, launch, matrix, processors
from torch import Tensor

from fastclip.system import env
from fastclip.system.rounding import ceil_div

__all__ = [
    "ALIGNMENT",
    "DIAGONAL",
    "FACTOR",
    "FINISH",
    "OUT",
    "PROJECT",
    "FinishSide",
    "Gradients",
    "add_products",
    "block_size",
    "finish_programs",
    "finish_rows",
    "in_two",
    "store_factors",
    "store_side",
    "total_of",
]

# Planes of the vectors. FACTOR multiplies the dot products of a row. DIAGONAL is the weight of a row's diagonal pair.
# OUT multiplies the row's finished gradient. PROJECT is 1 if the gradient is projected through the normalisation, and 0
# if the norm is a constant (below EPS, or not normalised).
FACTOR, DIAGONAL, OUT, PROJECT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)

ALIGNMENT = 128  # a multiple of every tile's sides, so that a block padded to it is written without masks
TINY = tl.constexpr(2.0**-100)
_LONGEST_SUM = 65536  # terms that one GEMM may add up: tensor cores truncate, so the error grows with the length
FINISH = {"BLOCK": 4, "BLOCK_D": 256}  # rows per program, and columns per step, of a finish kernel


@triton.jit
def store_factors(vec_ptrs, plane, inv, factor, out, in_rows, NORMALIZE: tl.constexpr):
    """Store the planes FACTOR, OUT and PROJECT of rows with inverse norms `inv`."""
    tl.store(vec_ptrs + FACTOR * plane, factor, mask=in_rows)
    tl.store(vec_ptrs + OUT * plane, out, mask=in_rows)
    project = tl.zeros_like(inv)
    if NORMALIZE:
        project = tl.where(inv * EPS < 1.0, 1.0, project)
    tl.store(vec_ptrs + PROJECT * plane, project, mask=in_rows)


@triton.jit
def store_side(vec_ptrs, plane, inv, in_rows, NORMALIZE: tl.constexpr, COPY: tl.constexpr):
    """Store FACTOR, OUT and PROJECT with an OUT that lacks scale and gain, which the finish multiplies in.

    With COPY the products read copies of the rows times a power of two, and OUT is that power.
    """
    factor, power = inv, tl.full(inv.shape, 1.0, tl.float32)
    if COPY:
        factor, power = without_power(inv)
    store_factors(vec_ptrs, plane, inv, factor, power, in_rows, NORMALIZE)


@triton.jit
def total_of(part_ptr, first, last, BLOCK: tl.constexpr):
    """Sum of parts first to last - 1 in fp64. The order is fixed, which makes the sum bitwise repeatable."""
    k = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for k0 in range(first, last, BLOCK):
        total += tl.load(part_ptr + k0 + k, mask=k0 + k < last, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def in_two(factor):
    """Split a fp64 factor into two fp32 factors whose product keeps its digits.

    The mean over many pairs makes the factor tiny, possibly below the normal range of fp32. The second factor is then
    2^-100.
    """
    power = tl.where(tl.abs(factor) < TINY, TINY, 1.0).to(tl.float32)
    return (factor / power).to(tl.float32), power


@triton.jit
def finish_rows(
    side, other, k0, l0, size, plane, other_plane, D, offset, diagonal_gain, factor, power,
    HAS_DIAGONAL: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Finish BLOCK rows of one side and store their gradients; return the diagonal pairs' part of d_scale.

    `side.raw` has `size` rows and begins with row k0 of the side. The program begins with row l0 of `side.raw`.
    The weights of diagonal pairs are multiplied by `diagonal_gain`, the gradients by `factor` and then by `power`.
    """
    rows = l0 + tl.arange(0, BLOCK)
    in_rows, k = rows < size, k0 + rows
    partner = k + offset
    has_partner = in_rows & (partner >= 0) & (partner < other_plane)
    partner = tl.where(has_partner, partner, 0)
    weight = tl.zeros((BLOCK,), tl.float32)
    if HAS_DIAGONAL:
        weight = tl.load(side.vec + DIAGONAL * plane + k, mask=in_rows, other=0.0) * diagonal_gain
        weight *= tl.load(side.vec + FACTOR * plane + k, mask=in_rows, other=0.0)
        weight *= tl.load(other.vec + FACTOR * other_plane + partner, mask=has_partner, other=0.0)
    raw_ptrs = side.raw.ptr + rows.to(tl.int64)[:, None] * side.raw.row_stride
    x_ptrs = side.x.ptr + k.to(tl.int64)[:, None] * side.x.row_stride
    other_ptrs = other.x.ptr + partner.to(tl.int64)[:, None] * other.x.row_stride
    valid, partner_valid = in_rows[:, None], has_partner[:, None]
    along, dot, squares = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)[None, :]
        x = tl.load(x_ptrs + d, mask=valid & (d < D), other=0.0).to(tl.float32)
        g = tl.zeros_like(x)
        if WRITE:
            g = tl.load(raw_ptrs + d, mask=valid & (d < D), other=0.0)
        if HAS_DIAGONAL:
            y = tl.load(other_ptrs + d, mask=partner_valid & (d < D), other=0.0).to(tl.float32)
            dot += tl.sum(x * y, 1)
            g += weight[:, None] * y
        along += tl.sum(x * g, 1)
        squares += tl.sum(x * x, 1)
    if WRITE:
        # Project with <x, g> / <x, x> of the rows themselves: the rounded inverse norm would leave more of g along x
        project = tl.load(side.vec + PROJECT * plane + k, mask=in_rows, other=0.0)
        along = tl.where(project != 0, along / tl.where(project != 0, squares, 1.0), 0.0)
        factor *= tl.load(side.vec + OUT * plane + k, mask=in_rows, other=0.0)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)[None, :]
            x = tl.load(x_ptrs + d, mask=valid & (d < D), other=0.0).to(tl.float32)
            g = tl.load(raw_ptrs + d, mask=valid & (d < D), other=0.0)
            if HAS_DIAGONAL:
                g += weight[:, None] * tl.load(other_ptrs + d, mask=partner_valid & (d < D), other=0.0).to(tl.float32)
            g = factor[:, None] * (g - along[:, None] * x) * power
            out_ptrs = side.out + k.to(tl.int64)[:, None] * D + d
            tl.store(out_ptrs, g.to(side.out.dtype.element_ty), mask=valid & (d < D))
    return tl.sum(weight * dot, 0)


@triton.jit(do_not_specialize=["i0", "rows", "M", "N", "offset"])
def finish_kernel(
    row,  # a `FinishSide`, whose raw (rows, ...) starts at image i0
    col,  # a `FinishSide` of all texts
    part_ptr,  # (programs of images,) fp32: the diagonal pairs' part of d_scale; written with HAS_DIAGONAL
    i0,
    rows,
    M,
    N,
    D,
    offset,
    HAS_DIAGONAL: tl.constexpr,
    WRITE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of the features: the products plus the diagonal pairs, projected, scaled and cast.

    Math      g_k = raw_k + DIAGONAL_k FACTOR_k FACTOR_j other_j with j = k + offset
              out_k = OUT_k (g_k - x_k <x_k, g_k> / <x_k, x_k>), without the projection if PROJECT_k is 0
    Program   BLOCK of `rows` images, and after them BLOCK of all texts, in two passes over D
    Traffic   reads raw, x and other twice, writes out once
    Precision fp32, with the weight of the diagonal pair never rounded to the dtype of the features
    Ragged    rows beyond the last and the D tail load as 0
    Order     one program computes a whole row: bitwise repeatable
    """
    block, blocks = tl.program_id(0), tl.cdiv(rows, BLOCK)
    if block < blocks:
        d_scale = finish_rows(
            row, col, i0, block * BLOCK, rows, M, N, D, offset, 1.0, 1.0, 1.0, HAS_DIAGONAL, WRITE_ROWS, BLOCK, BLOCK_D
        )  # fmt: skip
        if HAS_DIAGONAL:
            tl.store(part_ptr + block, d_scale)
    else:
        first = (block - blocks) * BLOCK
        finish_rows(
            col, row, 0, first, N, N, M, D, -offset, 1.0, 1.0, 1.0, HAS_DIAGONAL, True, BLOCK, BLOCK_D
        )  # fmt: skip


class FinishSide(NamedTuple):
    """Inputs and output of one side (images or texts) of a finish kernel."""

    raw: Matrix  # (rows, D) fp32, plus padding columns: sum_j FACTOR_k G_kj FACTOR_j other_j
    x: Matrix  # (size, D)
    vec: Tensor  # (planes, size): FACTOR, DIAGONAL, OUT, PROJECT
    out: Tensor  # (size, D)


def _padded(size: int) -> int:
    return ceil_div(size, ALIGNMENT) * ALIGNMENT


def block_size(x: Tensor, M: int, N: int, D: int) -> tuple[int, int]:
    """Return the rows and columns of a block of weights that fits into the workspace, in whole tiles."""
    weights = env.workspace_bytes("cuda") // x.element_size()
    # Rows per wave: with this many rows the library's product with the texts, in tiles of 128 x 256, occupies every
    # multiprocessor once
    wave = max(processors(x.device) // ceil_div(D, 256), 1) * ALIGNMENT
    # Columns are cut if nearly a wave of rows would not fit otherwise. Idle multiprocessors cost more than adding once
    # more to the sums of a block's images.
    fit = min(weights // _padded(min(wave - wave // 8, M)), _LONGEST_SUM)
    most = max(fit // ALIGNMENT, 1) * ALIGNMENT
    block_n = _padded(ceil_div(N, ceil_div(N, most)))
    rows = min(weights // block_n, _LONGEST_SUM)
    rows = rows // wave * wave or rows // ALIGNMENT * ALIGNMENT
    return min(_padded(M), max(rows, ALIGNMENT)), block_n


def finish_programs(sums: int, rows: int, columns: int) -> int:
    """Number of programs of a finish: for the scalar sums, the rows of images and the rows of texts."""
    return sums + ceil_div(rows, FINISH["BLOCK"]) + ceil_div(columns, FINISH["BLOCK"])


def add_products(
    block: Tensor,
    x: Tensor,
    y: Tensor,
    raw_image: Tensor | None,
    raw_text: Tensor | None,
    rows: tuple[int, int],
    columns: tuple[int, int],
    whole: bool = False,
) -> None:
    """Add the products of a block of weights with both features to `raw_image` (rows of the block, D) and `raw_text`
    (N, D), each unless None. The first block of a row or column of blocks overwrites instead.

    whole: the block is the whole problem, so nothing is sliced. That saves host time.
    """
    (i0, i1), (j0, j1) = rows, columns
    if raw_image is not None:
        addmm(raw_image if whole else raw_image[: i1 - i0], block, y if whole else y[j0:j1], keep=j0 > 0)
    if raw_text is not None:
        addmm(raw_text if whole else raw_text[j0:j1], block.T, x if whole else x[i0:i1], keep=i0 > 0)


class Gradients:
    """Gradients of a problem that is cut into blocks; `kinds` are the tile configurations that may compute a block."""

    def __init__(
        self, image: Features, text: Features, D: int, block: tuple[int, int], kinds: tuple[Config, ...]
    ) -> None:
        self.image, self.text, self.D, self.kinds = image, text, D, kinds
        self.M, self.N = len(image.x), len(text.x)
        self.block_m, self.block_n = block
        self.rows, self.columns = chunks(self.M, self.block_m), chunks(self.N, self.block_n)
        self.tile_parts = sum(self.tiles(i1 - i0, j1 - j0) for i0, i1 in self.rows for j0, j1 in self.columns)
        self.finish_parts = ceil_div(self.M, FINISH["BLOCK"])

    def tiles(self, rows: int, columns: int) -> int:
        """Number of partial sums of a block: its tiles in the finest configuration, rounded up to a multiple of 4."""
        # 4 fp32 numbers are 16 bytes: every block's partial sums start at a multiple of 16, as compiled kernels assume
        return max(ceil_div(rows, kind.BLOCK_M) * ceil_div(columns, kind.BLOCK_N) + 3 & ~3 for kind in self.kinds)

    def compute(
        self,
        weigh: Callable[[int, int, int, int, Tensor, Tensor], None],
        row_vec: Tensor,
        col_vec: Tensor,
        offset: int | None,
        part: Tensor,
        d_image: Tensor | None,
        d_text: Tensor | None,
    ) -> None:
        """Write d_image (M, D) and d_text (N, D), each unless None.

        ``weigh(i0, i1, j0, j1, weights, part)`` stores the weights r_i G_ij c_j of a block and every tile's partial sum
        of d_scale. offset: row i has its diagonal pair, whose weight is in the vectors, in column i + offset; None if
        no weight is kept apart. part (tile_parts + finish_parts,): partial sums of d_scale, first of the tiles, then of
        the diagonal pairs.
        """
        x, y = self.image.x, self.text.x
        weights = x.new_empty(self.block_m, self.block_n)
        raw_text = None if d_text is None else x.new_empty(self.N, x.shape[1], dtype=torch.float32)
        raw_image = x.new_empty(0 if d_image is None else self.block_m, x.shape[1], dtype=torch.float32)
        # A gradient that is not needed is neither read nor written: any tensor can take its place
        row = FinishSide(matrix(raw_image), matrix(x), row_vec, raw_image if d_image is None else d_image)
        col = FinishSide(
            matrix(raw_image if raw_text is None else raw_text),
            matrix(y),
            col_vec,
            raw_image if d_text is None else d_text,
        )
        first = 0
        # Blocks of columns are the inner loop: raw_image is then needed for the rows of one chunk only
        for i0, i1 in self.rows:
            for j0, j1 in self.columns:
                weigh(i0, i1, j0, j1, weights, part[first:])
                first += self.tiles(i1 - i0, j1 - j0)
                block = weights[: i1 - i0, : j1 - j0]
                add_products(block, x, y, None if d_image is None else raw_image, raw_text, (i0, i1), (j0, j1))
            rows = i1 - i0 if d_image is not None or offset is not None else 0
            cols = self.N if d_text is not None and i1 == self.M else 0  # complete after the last chunk
            if rows or cols:
                shares = part[self.tile_parts + i0 // FINISH["BLOCK"] :]
                arguments = row, col, shares, i0, rows, self.M, self.N, self.D, offset or 0
                flags = {"HAS_DIAGONAL": offset is not None, "WRITE_ROWS": d_image is not None}
                launch(finish_kernel, finish_programs(0, rows, cols), *arguments, **flags, **FINISH)
