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

# Planes: what a dot product is multiplied with; of the own pair the weight; of the result the factor, and whether it
# is projected (1, or 0 where the norm is a constant)
FACTOR, DIAGONAL, OUT, PROJECT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)

ALIGNMENT = 128  # every tile divides it: a block of weights padded to it is written without masks
TINY = tl.constexpr(2.0**-100)
_LONGEST_SUM = 65536  # terms in one chain of additions: tensor cores truncate
FINISH = {"BLOCK": 4, "BLOCK_D": 256}  # rows and columns of a program of a finish, at a time


@triton.jit
def store_factors(vec_ptrs, plane, inv, factor, out, in_rows, NORMALIZE: tl.constexpr):
    """Stores FACTOR, OUT and PROJECT of rows with these inverse norms."""
    tl.store(vec_ptrs + FACTOR * plane, factor, mask=in_rows)
    tl.store(vec_ptrs + OUT * plane, out, mask=in_rows)
    project = tl.zeros_like(inv)
    if NORMALIZE:
        project = tl.where(inv * EPS < 1.0, 1.0, project)
    tl.store(vec_ptrs + PROJECT * plane, project, mask=in_rows)


@triton.jit
def store_side(vec_ptrs, plane, inv, in_rows, NORMALIZE: tl.constexpr, COPY: tl.constexpr):
    """Stores the same without scale and gain, which the finish knows. COPY: the products see the rows times OUT."""
    factor, power = inv, tl.full(inv.shape, 1.0, tl.float32)
    if COPY:
        factor, power = without_power(inv)
    store_factors(vec_ptrs, plane, inv, factor, power, in_rows, NORMALIZE)


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
    side, other, k0, l0, size, plane, other_plane, D, offset, diagonal_gain, factor, power,
    HAS_DIAGONAL: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Finishes rows l0 and on of the `size` that `side.raw` has, the side's from k0 on; returns their share of d_scale.

    Their own pairs' weights are multiplied by `diagonal_gain`, they themselves by `factor` and then by `power`.
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
        # <u, g> u from these very rows: the rounded inverse norm would leave more of g along u
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
    row,  # a `FinishSide`; raw (rows, ...) is of the images from i0 on
    col,
    part_ptr,  # (programs of images,): their share of d_scale; written with HAS_DIAGONAL
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
    """One side of the finish."""

    raw: Matrix  # (rows, D) fp32, or more columns: sum_j G_kj r_k c_j other_j
    x: Matrix  # (size, D)
    vec: Tensor  # (planes, size): FACTOR, DIAGONAL, OUT, PROJECT
    out: Tensor  # (size, D)


def _padded(size: int) -> int:
    return ceil_div(size, ALIGNMENT) * ALIGNMENT


def block_size(x: Tensor, M: int, N: int, D: int) -> tuple[int, int]:
    """Rows and columns, whole tiles, of the blocks of weights for features like `x`: each fits into the workspace."""
    weights = env.workspace_bytes("cuda") // x.element_size()
    # The product with the texts fills whole waves of processors with its tiles of 128 x 256
    wave = max(processors(x.device) // ceil_div(D, 256), 1) * ALIGNMENT
    # Columns are cut where not nearly a wave of rows would fit: idle processors cost more than one more addition to the
    # sums of a block's images
    fit = min(weights // _padded(min(wave - wave // 8, M)), _LONGEST_SUM)
    most = max(fit // ALIGNMENT, 1) * ALIGNMENT
    block_n = _padded(ceil_div(N, ceil_div(N, most)))
    rows = min(weights // block_n, _LONGEST_SUM)
    rows = rows // wave * wave or rows // ALIGNMENT * ALIGNMENT
    return min(_padded(M), max(rows, ALIGNMENT)), block_n


def finish_programs(sums: int, rows: int, columns: int) -> int:
    """Count the programs of a finish: of the sums, of rows of images and of texts."""
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
    """Add a block of weights times the features to the sums of its images (rows, D) and of all texts, where there are
    such; `whole`: the block is all of the problem, and nothing has to be sliced."""
    (i0, i1), (j0, j1) = rows, columns
    if raw_image is not None:
        addmm(raw_image if whole else raw_image[: i1 - i0], block, y if whole else y[j0:j1], keep=j0 > 0)
    if raw_text is not None:
        addmm(raw_text if whole else raw_text[j0:j1], block.T, x if whole else x[i0:i1], keep=i0 > 0)


class Gradients:
    """A problem cut into blocks of weights, by `block_size`, whose tiles are of some `kinds`."""

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
        """Count a block's tiles, of the kind that has most; a multiple of 4, so that every block's start aligned."""
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
        """Write d_image (M, D), d_text (N, D), from the weights r_i G_ij c_j that ``weigh(i0, i1, j0, j1, weights,
        part)`` stores, with the shares of d_scale of every tile.

        offset: of the own pairs, whose weights are in the vectors and not among the stored; None when there are none.
        part (tile_parts + finish_parts,): shares of d_scale, the tiles' and after them the own pairs'.
        """
        x, y = self.image.x, self.text.x
        weights = x.new_empty(self.block_m, self.block_n)
        raw_text = None if d_text is None else x.new_empty(self.N, x.shape[1], dtype=torch.float32)
        raw_image = x.new_empty(0 if d_image is None else self.block_m, x.shape[1], dtype=torch.float32)
        # What is not wanted is neither read nor written: any tensor stands in its place
        row = FinishSide(matrix(raw_image), matrix(x), row_vec, raw_image if d_image is None else d_image)
        col = FinishSide(
            matrix(raw_image if raw_text is None else raw_text),
            matrix(y),
            col_vec,
            raw_image if d_text is None else d_text,
        )
        first = 0
        for i0, i1 in self.rows:
            for j0, j1 in self.columns:
                weigh(i0, i1, j0, j1, weights, part[first:])
                first += self.tiles(i1 - i0, j1 - j0)
                block = weights[: i1 - i0, : j1 - j0]
                add_products(block, x, y, None if d_image is None else raw_image, raw_text, (i0, i1), (j0, j1))
            rows = i1 - i0 if d_image is not None or offset is not None else 0
            cols = self.N if d_text is not None and i1 == self.M else 0  # the last chunk completes the texts
            if rows or cols:
                shares = part[self.tile_parts + i0 // FINISH["BLOCK"] :]
                arguments = row, col, shares, i0, rows, self.M, self.N, self.D, offset or 0
                flags = {"HAS_DIAGONAL": offset is not None, "WRITE_ROWS": d_image is not None}
                launch(finish_kernel, finish_programs(0, rows, cols), *arguments, **flags, **FINISH)
