"""Inverse norms, logits of the positives, and copies of the features that the matrix products can read.

Features are copied in two cases only. Normalised float16 and float32 rows are multiplied by the power of two that
brings their norm into (1/2, 1], so that neither their products nor the stored weights overflow or flush to zero. Rows
that are not aligned to 16 bytes are copied to rows that are. Normalised features are never stored: a product reads the
rows as they are (or times a power of two, which is exact), and its result is multiplied by the remaining factors. That
way a normalised feature is never rounded to 16 bits.

c is the number that is subtracted from every logit before the exponential (docs/mathematics.md), and c2 = log2(e) c the
constant OFFSET2. `offset` is that of the diagonal: row i meets it in column i + offset.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastclip.triton_kernels.launch import Matrix, launch, matrix, with_rows
from fastclip.triton_kernels.tile import BOUND, CONSTANTS, INF, LOG2E, OFFSET2, REPAIR, SCALE
from torch import Tensor

from fastclip.system.rounding import ceil_div

__all__ = [
    "EPS",
    "NORMS",
    "Features",
    "bound_kernel",
    "bound_of",
    "copy_sides_kernel",
    "high_bit",
    "inverse_norm",
    "largest_norm",
    "needs_copy",
    "norms",
    "pair_sums",
    "set_constants",
    "unit_norm",
    "without_power",
]

EPS = tl.constexpr(1e-12)  # lower bound of a norm; equals the reference's, which this layer must not import
# A logit may be this far above c: exp(70) = 2.5e30, and fp32 holds a sum of a million of them
REACH = tl.constexpr(70.0)


@triton.jit
def inverse_norm(squares, NORMALIZE: tl.constexpr):
    """Return 1 / max(norm, EPS) in fp32, or 1 without NORMALIZE; NaN is kept."""
    if NORMALIZE:
        norm = tl.sqrt(squares)
        return (1.0 / tl.where(norm < EPS, EPS, norm)).to(tl.float32)
    else:
        return tl.where(squares == squares, 1.0, squares).to(tl.float32)


@triton.jit
def _wide(x):
    """Convert to fp64 through fp32, because Triton's interpreter cannot convert bfloat16 to fp64 directly."""
    return x.to(tl.float32).to(tl.float64)


@triton.jit
def pair_sums(
    x, y, k, partner, in_rows, has_partner, D, PAIRS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Return <x, x> of rows k, and with PAIRS also <y, y> and <x, y> with their diagonal partners (0 if none).

    The sums are fp64, in which no square of a fp32 number overflows or flushes to zero.
    """
    x_ptrs = x.ptr + k.to(tl.int64)[:, None] * x.row_stride
    y_ptrs = y.ptr + tl.where(has_partner, partner, 0).to(tl.int64)[:, None] * y.row_stride
    xx, yy, xy = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)[None, :]
        x_block = _wide(tl.load(x_ptrs + d, mask=in_rows[:, None] & (d < D), other=0.0))
        xx += tl.sum(x_block * x_block, 1)
        if PAIRS:
            y_block = _wide(tl.load(y_ptrs + d, mask=has_partner[:, None] & (d < D), other=0.0))
            yy += tl.sum(y_block * y_block, 1)
            xy += tl.sum(x_block * y_block, 1)
    return xx, yy, xy


@triton.jit
def unit_norm(squares, inv):
    """Return the norm of a row after normalisation: its norm times `inv`."""
    return (tl.sqrt(squares) * inv.to(tl.float64)).to(tl.float32)


class NormSide(NamedTuple):
    """Features and outputs of one side (images or texts) of `norms_kernel`."""

    x: Matrix  # (size, D)
    inv: Tensor  # (size,) fp32, written
    pos: Tensor | None  # (size,) fp64, written; None with labels


@triton.jit
def _norms(
    side, other, scale_ptr, k0, size, other_size, D, offset,
    NORMALIZE: tl.constexpr, LABELS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store the inverse norms and positive logits of rows k0, k0 + 1, ...; return their largest norm after scaling."""
    k = k0 + tl.arange(0, BLOCK)
    partner, in_rows = k + offset, k < size
    has_partner = in_rows & (partner >= 0) & (partner < other_size)
    xx, yy, xy = pair_sums(side.x, other.x, k, partner, in_rows, has_partner, D, not LABELS, BLOCK, BLOCK_D)
    inv = inverse_norm(xx, NORMALIZE)
    tl.store(side.inv + k, inv, mask=in_rows)
    if not LABELS:
        z = tl.load(scale_ptr).to(tl.float64) * inv.to(tl.float64) * inverse_norm(yy, NORMALIZE).to(tl.float64) * xy
        tl.store(side.pos + k, tl.where(has_partner, z, 0.0), mask=in_rows)
    return tl.max(unit_norm(xx, inv), 0)


@triton.jit
def largest_norm(x, inv_ptr, k, in_rows, D, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the largest norm of rows k after scaling by their inverse norms, as `norms_kernel` computes it."""
    xx, _, _ = pair_sums(x, x, k, k, in_rows, in_rows, D, False, BLOCK, BLOCK_D)
    return tl.max(unit_norm(xx, tl.load(inv_ptr + k, mask=in_rows, other=0.0)), 0)


@triton.jit
def bound_of(scale, top_ptr, rows, cols, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Return an upper bound of all |logits|.

    With NORMALIZE it is |scale|. Otherwise it is |scale| times the largest norms of both sides, read from `top_ptr`,
    where (rows + cols) programs stored theirs.
    """
    top = 1.0
    if not NORMALIZE:
        k = tl.arange(0, BLOCK)
        row_top, col_top = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for k0 in range(0, rows, BLOCK):
            row_top = tl.maximum(row_top, tl.load(top_ptr + k0 + k, mask=k0 + k < rows, other=0.0))
        for k0 in range(0, cols, BLOCK):
            col_top = tl.maximum(col_top, tl.load(top_ptr + rows + k0 + k, mask=k0 + k < cols, other=0.0))
        top = tl.max(row_top, 0) * tl.max(col_top, 0)
    return tl.abs(scale) * top


@triton.jit
def set_constants(constants_ptr, scale, bound, store):
    """Store SCALE, BOUND and OFFSET2 if `store`; return OFFSET2.

    OFFSET2 is c2. c is 0 if no logit is above REACH, because subtracting another number costs digits of exp's argument.
    """
    offset2 = tl.where(bound <= REACH, 0.0, bound - REACH) * LOG2E
    if store:
        tl.store(constants_ptr + SCALE, scale)
        tl.store(constants_ptr + BOUND, bound)
        tl.store(constants_ptr + OFFSET2, offset2)
    return offset2


@triton.jit(do_not_specialize=["M", "N", "offset"])
def norms_kernel(
    row,  # a `NormSide`
    col,
    top_ptr,  # (programs,) fp32
    constants_ptr,
    scale_ptr,
    M,
    N,
    D,
    offset,
    NORMALIZE: tl.constexpr,
    LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Inverse norms of all rows and, without labels, the logits of the positives.

    Math      r_i = 1 / max(|image_i|, 1e-12) with NORMALIZE, else 1
              row_pos_i = s r_i c_j <image_i, text_j> with j = i + offset; the same for the texts (c_j, col_pos_j)
              top = largest r_i |image_i| of a program's rows
    Program   BLOCK rows of images or of texts, program 0 also writes the constants if NORMALIZE
    Traffic   reads every row twice, as itself and as the partner of its pair
    Precision fp64
    Ragged    rows beyond the last and the D tail load as 0
    Order     one program computes a whole row: bitwise repeatable
    """
    block, blocks = tl.program_id(0), tl.cdiv(M, BLOCK)
    if block < blocks:
        top = _norms(row, col, scale_ptr, block * BLOCK, M, N, D, offset, NORMALIZE, LABELS, BLOCK, BLOCK_D)
    else:
        first = (block - blocks) * BLOCK
        top = _norms(col, row, scale_ptr, first, N, M, D, -offset, NORMALIZE, LABELS, BLOCK, BLOCK_D)
    if NORMALIZE:
        scale = tl.load(scale_ptr).to(tl.float32)
        set_constants(constants_ptr, scale, bound_of(scale, top_ptr, 0, 0, NORMALIZE, BLOCK), block == 0)
    else:
        tl.store(top_ptr + block, top)
    if block == 0:
        tl.store(constants_ptr + REPAIR, 0.0)


@triton.jit(do_not_specialize=["rows", "cols"])
def bound_kernel(top_ptr, constants_ptr, scale_ptr, rows, cols, BLOCK: tl.constexpr):
    """Store the constants from the largest norms that (rows + cols) programs of `norms_kernel` found. One program."""
    scale = tl.load(scale_ptr).to(tl.float32)
    set_constants(constants_ptr, scale, bound_of(scale, top_ptr, rows, cols, False, BLOCK), True)


@triton.jit
def high_bit(x):
    """Return the largest power of two not above a positive fp64 number; 1 if the number is 0, infinite or NaN."""
    power = (x.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)
    return tl.where((power > 0) & (power < INF), power, 1.0)


@triton.jit
def without_power(inv):
    """Split `inv` into a factor in [1, 2) and a power of two, both fp32; return the two."""
    power = high_bit(inv.to(tl.float64))
    return (inv.to(tl.float64) / power).to(tl.float32), power.to(tl.float32)


@triton.jit
def _scale_rows(x, out, power, k, in_rows, D, BLOCK_D: tl.constexpr):
    """Copy rows k times their powers of two, multiplied in fp64; columns beyond D become 0."""
    x_ptrs = x.ptr + k.to(tl.int64)[:, None] * x.row_stride
    out_ptrs = out.ptr + k.to(tl.int64)[:, None] * out.row_stride
    for d0 in range(0, out.row_stride, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)[None, :]
        values = tl.load(x_ptrs + d, mask=in_rows[:, None] & (d < D), other=0.0)
        scaled = _wide(values) * power.to(tl.float64)[:, None]
        tl.store(out_ptrs + d, scaled.to(tl.float32).to(values.dtype), mask=in_rows[:, None] & (d < out.row_stride))


@triton.jit(do_not_specialize=["size"])
def copy_rows_kernel(
    x,  # a `Matrix` (size, D)
    inv_ptr,  # (size,) fp32
    out,  # (size, out.row_stride), columns beyond D become 0
    factor_ptr,  # (size,) fp32
    size,
    D,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Copy of the rows with a norm in (1/2, 1], and the factors that are left to normalise them.

    Math      out_k = 2^e x_k and factor_k = inv_k / 2^e in [1, 2)
    Program   BLOCK rows
    Traffic   reads and writes every row once
    Precision exact, except that elements smaller than 2^-24 times the norm of their row may flush in fp16
    Ragged    rows beyond the last are not written, columns from D to the row stride become 0
    Order     one program copies a whole row: bitwise repeatable
    """
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_rows = k < size
    factor, power = without_power(tl.load(inv_ptr + k, mask=in_rows, other=1.0))
    tl.store(factor_ptr + k, factor, mask=in_rows)
    _scale_rows(x, out, power, k, in_rows, D, BLOCK_D)


@triton.jit(do_not_specialize=["row_power_ptr", "col_power_ptr", "M", "N"])
def copy_sides_kernel(
    image,  # a `Matrix` (M, D)
    text,  # (N, D)
    row_power_ptr,  # (M,) fp32
    col_power_ptr,  # (N,) fp32
    row_out,  # (M, row_out.row_stride): the columns beyond D become 0
    col_out,  # (N, ...)
    M,
    N,
    D,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Copy the rows of both sides times given powers of two, in one launch; see `copy_rows_kernel`."""
    block, blocks = tl.program_id(0), tl.cdiv(M, BLOCK)
    k = tl.arange(0, BLOCK)
    if block < blocks:
        k += block * BLOCK
        power = tl.load(row_power_ptr + k, mask=k < M, other=1.0)
        _scale_rows(image, row_out, power, k, k < M, D, BLOCK_D)
    else:
        k += (block - blocks) * BLOCK
        power = tl.load(col_power_ptr + k, mask=k < N, other=1.0)
        _scale_rows(text, col_out, power, k, k < N, D, BLOCK_D)


NORMS = {"BLOCK": 8, "BLOCK_D": 128}  # rows per program, and columns per step, of kernels that read features


def needs_copy(x: Tensor, normalize: bool) -> bool:
    """Return True if the matrix products cannot read the rows of `x` (size, D) in place; see the head of the module."""
    aligned = x.stride(1) == 1 and x.stride(0) >= x.shape[1]
    aligned &= x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    aligned &= x.shape[1] % 8 == 0  # both sides have the same D, so both are padded or neither
    return not aligned or (normalize and x.dtype != torch.bfloat16)


class Features(NamedTuple):
    """Rows of one side as the products read them, and the factors that their products are multiplied by."""

    x: Tensor  # (size, D), plus columns of zeros if copied
    factor: Tensor  # (size,) fp32

    @staticmethod
    def of(x: Tensor, inv: Tensor, normalize: bool) -> Features:
        """Prepare features (size, D) with inverse norms `inv` (size,) fp32; copy them if the products need it."""
        if not needs_copy(x, normalize):
            return Features(x, inv)
        size, D = x.shape
        out = x.new_empty(size, ceil_div(D, 8) * 8)
        factor = torch.empty_like(inv)
        x = with_rows(x)
        launch(
            copy_rows_kernel,
            ceil_div(size, NORMS["BLOCK"]),
            *(matrix(x), inv, matrix(out), factor, size, D),
            **NORMS,
        )
        return Features(out, factor)


class Norms(NamedTuple):
    """Results of `norms`."""

    row_inv: Tensor  # (M,) fp32
    col_inv: Tensor  # (N,) fp32
    row_pos: Tensor  # (M,) fp64: logit of the positive, 0 if there is none; empty with labels
    col_pos: Tensor  # (N,) fp64
    constants: Tensor


def norms(image: Tensor, text: Tensor, scale: Tensor, offset: int, normalize: bool, labels: bool) -> Norms:
    """Compute inverse norms and positive logits in one launch; a second bounds the logits unless `normalize`."""
    M, D = image.shape
    N = text.shape[0]
    image, text = (with_rows(x) for x in (image, text))
    rows, cols = ceil_div(M, NORMS["BLOCK"]), ceil_div(N, NORMS["BLOCK"])
    row_inv, col_inv, top, constants = (image.new_empty(n, dtype=torch.float32) for n in (M, N, rows + cols, CONSTANTS))
    row_pos, col_pos = (image.new_empty(n, dtype=torch.float64) for n in ((0, 0) if labels else (M, N)))
    row = NormSide(matrix(image), row_inv, None if labels else row_pos)
    col = NormSide(matrix(text), col_inv, None if labels else col_pos)
    launch(
        norms_kernel,
        rows + cols,
        *(row, col, top, constants, scale, M, N, D, offset),
        NORMALIZE=normalize,
        LABELS=labels,
        **NORMS,
    )
    if not normalize:
        launch(bound_kernel, 1, top, constants, scale, rows, cols, BLOCK=1024)
    return Norms(row_inv, col_inv, row_pos, col_pos, constants)
