"""What every pass needs of the features: inverse norms, the positives' logits, rows that the products can take.

Rows that the products cannot take as they lie are copied: float16 and float32 rows times the power of two that brings
their norm into (1/2, 1], so that neither their products nor the stored weights overflow or flush; rows that are not
aligned to 16 bytes are laid out anew. Normalised 16-bit features are never formed.
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

EPS = tl.constexpr(1e-12)  # lower bound of a norm: the reference's, which a module below it cannot import
REACH = tl.constexpr(70.0)  # exponentials, and sums of a million of them, do not overflow so far above their offset


@triton.jit
def inverse_norm(squares, NORMALIZE: tl.constexpr):
    """1 / max(norm, EPS) in fp32, or 1; NaN stays."""
    if NORMALIZE:
        norm = tl.sqrt(squares)
        return (1.0 / tl.where(norm < EPS, EPS, norm)).to(tl.float32)
    else:
        return tl.where(squares == squares, 1.0, squares).to(tl.float32)


@triton.jit
def _wide(x):
    """fp64, by way of fp32: Triton's interpreter knows no other way from bfloat16."""
    return x.to(tl.float32).to(tl.float64)


@triton.jit
def pair_sums(
    x, y, k, partner, in_rows, has_partner, D, PAIRS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """<x, x> of rows k; with PAIRS also <y, y> and <x, y> of their partners, where they have one.

    fp64: squares of fp32 neither overflow nor flush.
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
    """Norm of a row times its inverse norm."""
    return (tl.sqrt(squares) * inv.to(tl.float64)).to(tl.float32)


class NormSide(NamedTuple):
    """One side of `norms_kernel`."""

    x: Matrix  # (size, D)
    inv: Tensor  # (size,) fp32, written
    pos: Tensor | None  # (size,) fp64, written; None with labels


@triton.jit
def _norms(
    side, other, scale_ptr, k0, size, other_size, D, offset,
    NORMALIZE: tl.constexpr, LABELS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Stores one side's inverse norms and positive logits from row k0 on; returns the largest norm of a unit row."""
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
    """The largest norm of the unit rows k, as `norms_kernel` finds it."""
    xx, _, _ = pair_sums(x, x, k, k, in_rows, in_rows, D, False, BLOCK, BLOCK_D)
    return tl.max(unit_norm(xx, tl.load(inv_ptr + k, mask=in_rows, other=0.0)), 0)


@triton.jit
def bound_of(scale, top_ptr, rows, cols, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Bound on the logits; where rows are no unit rows from the largest norms of (rows + cols) programs."""
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
    """Stores the constants of a bound, if `store`; returns the offset: 0 where that reaches all logits, because the
    further an exponent is from 0, the more digits it loses."""
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

    Math      r_i = 1 / max(norm image_i, 1e-12), or 1; row_pos_i = s r_i c_j <image_i, text_j>, j = i + offset;
              columns mirrored; top = largest r_i norm_i of the program's rows
    Program   BLOCK rows of images, or of texts; the first writes the constants, where r_i norm_i is at most 1
    Traffic   reads every row twice (its own, and as its partner's positive)
    Precision fp64
    Ragged    rows beyond the last and the D tail load as 0
    Order     one program a row: bitwise repeatable
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
    """Constants from the largest norms of (rows + cols) programs of `norms_kernel`. One program."""
    scale = tl.load(scale_ptr).to(tl.float32)
    set_constants(constants_ptr, scale, bound_of(scale, top_ptr, rows, cols, False, BLOCK), True)


@triton.jit
def high_bit(x):
    """The power of two at or below a positive fp64; 1 where it is not finite or 0."""
    power = (x.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)
    return tl.where((power > 0) & (power < INF), power, 1.0)


@triton.jit
def without_power(inv):
    """A factor in [1, 2) and a power of two, fp32, whose product is `inv`."""
    power = high_bit(inv.to(tl.float64))
    return (inv.to(tl.float64) / power).to(tl.float32), power.to(tl.float32)


@triton.jit
def _scale_rows(x, out, power, k, in_rows, D, BLOCK_D: tl.constexpr):
    """Copies rows k, times their powers of two in fp64; columns beyond D become 0."""
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
    out,  # (size, out.row_stride): the columns beyond D become 0
    factor_ptr,  # (size,) fp32
    size,
    D,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows times the power of two in their inverse norm, and what remains of it: factor = inv / 2^e in [1, 2).

    Program   BLOCK rows
    Precision exact, but for elements 2^-24 below the row's norm, which may flush in fp16
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
    """Rows of both sides times powers of two that are known, as `copy_rows_kernel`."""
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


NORMS = {"BLOCK": 8, "BLOCK_D": 128}  # rows and columns of a program that reads features, at a time


def needs_copy(x: Tensor, normalize: bool) -> bool:
    """Tell whether the products cannot take rows (size, D) as they lie."""
    aligned = x.stride(1) == 1 and x.stride(0) >= x.shape[1]
    aligned &= x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    aligned &= x.shape[1] % 8 == 0  # or both sides are copied: the products need as many columns of both
    return not aligned or (normalize and x.dtype != torch.bfloat16)


class Features(NamedTuple):
    """One side's rows as the products see them, factor still to be multiplied in."""

    x: Tensor  # (size, D), or more columns of zeros
    factor: Tensor  # (size,) fp32

    @staticmethod
    def of(x: Tensor, inv: Tensor, normalize: bool) -> Features:
        """From features (size, D) and their inverse norms (size,) fp32."""
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
    """What `norms` computes."""

    row_inv: Tensor  # (M,) fp32
    col_inv: Tensor  # (N,) fp32
    row_pos: Tensor  # (M,) fp64: the positive's logit, 0 where there is none; nothing with labels
    col_pos: Tensor  # (N,) fp64
    constants: Tensor


def norms(image: Tensor, text: Tensor, scale: Tensor, offset: int, normalize: bool, labels: bool) -> Norms:
    """Compute norms and positives in one launch; in two where the bound on the logits has to be found."""
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
