"""Statistics of a student and a teacher, whose logits of the same pairs are computed tile by tile.

M, N and D are the numbers of images, texts and features of the student. i and j index images (rows) and texts
(columns). `offset` is that of the diagonal: row i meets it in column i + offset.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastclip.triton_kernels.features import Features, norms
from fastclip.triton_kernels.launch import TileLaunch, chunks, launch, panels_of
from fastclip.triton_kernels.tile import (
    INF,
    LN2,
    dot_tile,
    exact_logits2,
    load_vector,
    on_diagonal,
    scaled,
    tile_at,
)
from torch import Tensor

__all__ = ["Model", "distill_fwd", "distill_fwd_kernel", "model_of"]

_PLANES = 5  # maximum and sum of the student's exponentials; those of the teacher's, and their sum times the cosines


class Model(NamedTuple):
    """A student or teacher as its kernels read it."""

    rows: Features
    cols: Features
    row_inv: Tensor  # (M,) fp32
    col_inv: Tensor
    row_pos: Tensor  # (M,) fp64: logit of the positive
    col_pos: Tensor
    constants: Tensor

    def factors(self, i0: int) -> tuple[Tensor, Tensor]:
        """Return the factors of the rows from i0 on, and of all columns."""
        return self.rows.factor[i0:], self.cols.factor


def model_of(image: Tensor, text: Tensor, scale: Tensor, offset: int, normalize: bool) -> Model:
    """Prepare image (M, D), text (N, D) and scale ()."""
    n = norms(image, text, scale, offset, normalize, False)
    rows, cols = Features.of(image, n.row_inv, normalize), Features.of(text, n.col_inv, normalize)
    return Model(rows, cols, *n)


class FwdSides(NamedTuple):
    """Vectors of one side of both models."""

    student: Tensor  # (size,) fp32: factors of the dot products
    teacher: Tensor
    part: Tensor  # (planes, tiles across, size) fp32, written


@triton.jit
def _maxima(z2, keep):
    """Return z2, -inf where `keep` is false, and its largest element of every row and column, 0 where it is -inf."""
    z2 = tl.where(keep, z2, -INF)
    row_top, col_top = tl.max(z2, 1), tl.max(z2, 0)
    return z2, tl.where(row_top == -INF, 0.0, row_top), tl.where(col_top == -INF, 0.0, col_top)


@triton.jit
def _store(row, col, plane: tl.constexpr, row_values, col_values, tile, CONFIG: tl.constexpr):
    """Store a tile's partial results of one plane: rows in (planes, tiles_n, M), columns in (planes, tiles_m, N)."""
    M, N = tile.M, tile.N
    i, j = tile.i0 + tl.arange(0, CONFIG.BLOCK_M), tile.j0 + tl.arange(0, CONFIG.BLOCK_N)
    tiles_m, tiles_n = tl.cdiv(M, CONFIG.BLOCK_M), tl.cdiv(N, CONFIG.BLOCK_N)
    tl.store(row.part + (plane * tiles_n + tile.n).to(tl.int64) * M + i, row_values, mask=i < M)
    tl.store(col.part + (plane * tiles_m + tile.m).to(tl.int64) * N + j, col_values, mask=j < N)


@triton.jit(do_not_specialize=["M", "N", "offset"])
def distill_fwd_kernel(
    image,  # (M, D), a `Matrix` or a tensor descriptor
    text,  # (N, D)
    teacher_image,  # (M, D_teacher)
    teacher_text,  # (N, D_teacher)
    row,  # `FwdSides` of the images
    col,  # of the texts
    constants_ptr,  # SCALE of the student
    teacher_constants_ptr,
    M,
    N,
    D,
    D_teacher,
    offset,  # row i meets the diagonal in column i + offset
    TEACHER: tl.constexpr,  # like CONFIG, for the products of the teacher; the tiles are the same
    CONFIG: tl.constexpr,
):
    """Sums of exponentials of a student and its teacher along the rows and columns of every tile.

    Math      z2, t2 = log2(e) times the logits of student and teacher; u = r_i c_j <image_i, text_j> of the student
              over the negatives of a row: max z2, sum 2^(z2 - max), max t2, sum 2^(t2 - max), sum 2^(t2 - max) u
              the same over the negatives of a column
    Program   one (BLOCK_M, BLOCK_N) tile, in groups of tile rows that reuse L2
    Traffic   reads images once per tile column and texts once per tile row, of both models
              writes 20 (M tiles_n + N tiles_m) bytes
    Precision products in the input dtype, accumulation and exponentials in fp32, each from its own maximum
    Ragged    rows >= M and columns >= N are masked out of the sums, the D tail loads as 0
    Order     every tile stores its own partial sums, which are added in tile order: bitwise repeatable
    """
    tile = tile_at(tl.program_id(0), M, N, offset, CONFIG)
    i0, j0 = tile.i0, tile.j0
    i, j = tl.arange(0, CONFIG.BLOCK_M), tl.arange(0, CONFIG.BLOCK_N)
    keep = (i < M - i0)[:, None] & (j < N - j0)[None, :] & (on_diagonal(i, j, i0, j0, offset) == 0)

    dot = dot_tile(image, text, tile, D, CONFIG)
    factor, col_factor = load_vector(row.student, i0, i, M), load_vector(col.student, j0, j, N)[None, :]
    scale, rest = scaled(factor, constants_ptr)
    z2, rest2 = exact_logits2(dot, col_factor, scale, rest)
    cosine = tl.where(keep, dot * col_factor * factor[:, None], 0.0)
    z2, row_top, col_top = _maxima(z2, keep)
    _store(row, col, 0, row_top, col_top, tile, CONFIG)
    row_sum = tl.sum(tl.exp2(z2 - row_top[:, None] + rest2), 1)
    _store(row, col, 1, row_sum, tl.sum(tl.exp2(z2 - col_top[None, :] + rest2), 0), tile, CONFIG)

    dot = dot_tile(teacher_image, teacher_text, tile, D_teacher, TEACHER)
    scale, rest = scaled(load_vector(row.teacher, i0, i, M), teacher_constants_ptr)
    z2, rest2 = exact_logits2(dot, load_vector(col.teacher, j0, j, N)[None, :], scale, rest)
    z2, row_top, col_top = _maxima(z2, keep)
    _store(row, col, 2, row_top, col_top, tile, CONFIG)
    in_row, in_col = tl.exp2(z2 - row_top[:, None] + rest2), tl.exp2(z2 - col_top[None, :] + rest2)
    _store(row, col, 3, tl.sum(in_row, 1), tl.sum(in_col, 0), tile, CONFIG)
    _store(row, col, 4, tl.sum(in_row * cosine, 1), tl.sum(in_col * cosine, 0), tile, CONFIG)


def _merged(part: Tensor) -> Tensor:
    """Merge partial results (planes, parts, size) into (planes, size), fp64."""
    part = part.double()
    out = []
    for top, *sums in (part[:2], part[2:]):
        top = torch.where(sums[0] == 0.0, -torch.inf, top)  # an empty set, whose maximum is stored as 0
        largest = top.amax(0)
        weight = torch.exp2(top - torch.where(largest == -torch.inf, 0.0, largest))
        out += [torch.where(largest == -torch.inf, 0.0, largest), *((weight * x).sum(0) for x in sums)]
    return torch.stack(out)


def _statistics(student: Model, teacher: Model, offset: int) -> tuple[Tensor, Tensor]:
    """Compute the merged planes of the rows (planes, M) and of the columns (planes, N)."""
    (x, _), (y, _) = student.rows, student.cols
    (a, _), (b, _) = teacher.rows, teacher.cols
    (M, D), N, D_teacher = x.shape, len(y), a.shape[1]
    tiles = TileLaunch(distill_fwd_kernel, x, D, {})
    of_teacher = TileLaunch(distill_fwd_kernel, a, D_teacher, {}, tiles.tile)
    panel, *_ = panels_of((tiles.tile,), M, N, _PLANES)
    rows, cols = [], []
    for i0, i1 in chunks(M, panel):
        shape = i1 - i0, N
        tiles_m, tiles_n = tiles.shape(*shape)
        parts = (x.new_empty(_PLANES, *size, dtype=torch.float32) for size in ((tiles_n, i1 - i0), (tiles_m, N)))
        row, col = (FwdSides(*x) for x in zip(student.factors(i0), teacher.factors(i0), parts))
        operands = *tiles.operands(x[i0:i1], y), *of_teacher.operands(a[i0:i1], b)
        arguments = row, col, student.constants, teacher.constants, *shape, D, D_teacher, offset + i0
        options = {"TEACHER": of_teacher.options["CONFIG"], **tiles.options}
        launch(tiles.kernel, tiles.programs(*shape), *operands, *arguments, **options)
        rows.append(_merged(row.part))
        cols.append(_merged(col.part))
    return torch.cat(rows, 1), _merged(torch.stack(cols, 1))


def _logsumexp(top: Tensor, total: Tensor) -> Tensor:
    return (top + total.log2()) * LN2.value


def distill_fwd(
    student: tuple[Tensor, Tensor, Tensor], teachers: list[tuple[Tensor, Tensor, Tensor]], offset: int, normalize: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Compute the statistics of image, text and scale of a student and of its teachers.

    The first list has neg, pos and inv_norm of the student, each of the rows and of the columns, the second neg, pos
    and cosine of the teachers, (K, M) and (K, N), as the reference's `distill_fwd` defines them. It takes 4 M N D
    operations with one teacher of the same D; every further teacher takes 4 M N D more.
    """
    model = model_of(*student, offset, normalize)
    neg: list[Tensor] = []
    found: tuple[list[Tensor], ...] = tuple([] for _ in range(6))
    for teacher in teachers:
        other = model_of(*teacher, offset, normalize)
        sides = _statistics(model, other, offset)
        neg = [_logsumexp(side[0], side[1]) for side in sides]
        for k, (side, pos) in enumerate(zip(sides, (other.row_pos, other.col_pos))):
            found[k].append(_logsumexp(side[2], side[3]))
            found[2 + k].append(pos)
            found[4 + k].append(torch.where(side[3] == 0.0, 0.0, side[4] / side[3]))
    of_student = [*neg, model.row_pos, model.col_pos, model.row_inv, model.col_inv]
    return of_student, [torch.stack(x) for x in found]
