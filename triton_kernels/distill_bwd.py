"""Gradients of a student's features from the weights of its logits and of those of its teachers.

The weights of one block are added up in fp32, model by model, and rounded once. `gradients.py` multiplies them by the
student's features only. M, N and D are the numbers of images, texts and features of a block. `offset` is that of the
diagonal: row i meets it in column i + offset.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastclip.triton_kernels.distill_fwd import Model, model_of
from fastclip.triton_kernels.features import EPS
from fastclip.triton_kernels.gradients import Gradients, block_size
from fastclip.triton_kernels.launch import Matrix, TileLaunch, launch, matrix
from fastclip.triton_kernels.tile import (
    INF,
    LOG2E,
    dot_tile,
    exact_logits2,
    load_vector,
    on_diagonal,
    scaled,
    store_tile,
    tile_at,
)
from torch import Tensor

__all__ = ["distill_bwd", "distill_bwd_kernel"]


class BwdSide(NamedTuple):
    """Vectors of one side of one model, (size,) fp32."""

    factor: Tensor  # factors of the model's dot products
    lse2: Tensor  # log2-sum-exp2 over the negatives
    d: Tensor  # gain times the derivative with respect to it, 0 if there are no negatives
    out: Tensor  # factors of the weights: those of the student's dot products, and of the images also its scale

    def part(self, k0: int) -> BwdSide:
        return BwdSide(*(x[k0:] for x in self))


@triton.jit(do_not_specialize=["M", "N", "offset"])
def distill_bwd_kernel(
    image,  # (M, D), a `Matrix` or a tensor descriptor
    text,  # (N, D)
    row,  # `BwdSide` of the images
    col,  # of the texts
    constants_ptr,  # SCALE
    weights,  # a `Matrix` (M, N) fp32, padded to whole tiles
    part_ptr,  # (tiles,) fp32, written unless ADD
    M,
    N,
    D,
    offset,  # row i meets the diagonal in column i + offset
    ADD: tl.constexpr,  # add to the weights, which models before this one have stored
    CONFIG: tl.constexpr,
):
    """Weights of a block of one model's logits.

    Math      z2 = log2(e) s r_i c_j <image_i, text_j>
              g = d_i 2^(z2 - lse2_i) + d_j 2^(z2 - lse2_j) at negatives, 0 on the diagonal
              weights = g out_i out_j, added to those that are there with ADD
              part = sum of g r_i c_j <image_i, text_j> over a tile
    Program   one (BLOCK_M, BLOCK_N) tile, in groups of tile rows that reuse L2
    Traffic   reads image once per tile column and text once per tile row, writes the weights once, with ADD reads them
    Precision products in the input dtype, all else in fp32, each exponential from its own log-sum-exp
    Ragged    rows >= M and columns >= N get the weight 0
    Order     every tile stores its own partial sum: bitwise repeatable
    """
    number = tl.program_id(0)
    tile = tile_at(number, M, N, offset, CONFIG)
    i0, j0 = tile.i0, tile.j0
    i, j = tl.arange(0, CONFIG.BLOCK_M), tl.arange(0, CONFIG.BLOCK_N)
    keep = (i < M - i0)[:, None] & (j < N - j0)[None, :] & (on_diagonal(i, j, i0, j0, offset) == 0)
    dot = dot_tile(image, text, tile, D, CONFIG)
    factor, col_factor = load_vector(row.factor, i0, i, M), load_vector(col.factor, j0, j, N)[None, :]
    scale, rest = scaled(factor, constants_ptr)
    z2, rest2 = exact_logits2(dot, col_factor, scale, rest)
    z2 = tl.where(keep, z2, -INF)
    d, lse2 = load_vector(row.d, i0, i, M)[:, None], load_vector(row.lse2, i0, i, M)[:, None]
    # An empty set has d = 0 and an arbitrary log-sum-exp. Its exponential may be infinite, and 0 * inf is NaN.
    g = tl.where(d == 0, 0.0, d * tl.exp2(z2 - lse2 + rest2))
    d, lse2 = load_vector(col.d, j0, j, N)[None, :], load_vector(col.lse2, j0, j, N)[None, :]
    g += tl.where(d == 0, 0.0, d * tl.exp2(z2 - lse2 + rest2))
    g = tl.where(keep, g, 0.0)
    if not ADD:
        tl.store(part_ptr + number, tl.sum(tl.sum(tl.where(keep, g * (dot * col_factor * factor[:, None]), 0.0), 1), 0))
    g *= load_vector(row.out, i0, i, M)[:, None] * load_vector(col.out, j0, j, N)[None, :]
    if ADD:
        ptrs = weights.ptr + i0.to(tl.int64) * weights.row_stride + j0
        g += tl.load(ptrs + (i[:, None] * weights.row_stride + j[None, :]))
    store_tile(weights, i0, j0, g, False)


def _sides(
    model: Model, student: Model, neg: tuple[Tensor, Tensor], d: tuple[Tensor, Tensor], gain: Tensor, scale: Tensor
) -> list[BwdSide]:
    """Return the vectors of the rows and of the columns.

    The rounding error of a log-sum-exp in fp32 is moved into its derivative.
    """
    found = []
    outs = student.rows.factor * scale, student.cols.factor
    for features, lse, d_lse, out in zip((model.rows, model.cols), neg, d, outs):
        exact = lse.double() * LOG2E.value
        empty = exact == -torch.inf
        rounded = torch.where(empty, 0.0, exact).float()
        lost = torch.where(empty | (rounded.abs() > 2.0**40), 0.0, exact - rounded)
        weight = torch.where(empty, 0.0, gain * d_lse.double() * torch.exp2(-lost))
        found.append(BwdSide(features.factor, rounded, weight.float(), out.float()))
    return found


def _gain(of_student: list[Tensor], d_cosine: tuple[Tensor, Tensor], scale: Tensor) -> Tensor:
    """Return a power of two, fp64 (), with which no weight leaves the range of float16 (`gain_of`)."""
    K = len(d_cosine[0])
    sizes = [d.double().abs().amax() * scale.double().abs() for d in of_student]
    sizes += [d.double().abs().amax() * K for d in d_cosine]
    largest = torch.stack(sizes).nan_to_num(0.0, 0.0, 0.0).amax().clamp(1e-34, 1e34)
    return torch.ldexp(torch.full_like(largest, 1024.0), 1 - torch.frexp(largest).exponent)


def _vectors(model: Model, diagonal: tuple[Tensor, Tensor], gain: Tensor, normalize: bool) -> list[Tensor]:
    """Return the planes of `gradients.py`, (4, M) and (4, N) fp32."""
    found = []
    sides = (model.rows, model.row_inv, diagonal[0]), (model.cols, model.col_inv, diagonal[1])
    for features, inv, weight in sides:
        project = (inv * EPS.value < 1.0).float() if normalize else torch.zeros_like(inv)
        planes = features.factor, gain * weight, inv.double() / features.factor / gain, project
        found.append(torch.stack([x.float() for x in planes]))
    return found


def _at_partners(x: Tensor, size: int, offset: int) -> Tensor:
    """Return x[k + offset] for every k in range(size), and 0 where there is none."""
    k = torch.arange(size, device=x.device) + offset
    has_partner = (k >= 0) & (k < len(x))
    return torch.where(has_partner, x[k.clamp(0, len(x) - 1)], 0.0)


def distill_bwd(
    student: tuple[Tensor, Tensor, Tensor],
    teachers: list[tuple[Tensor, Tensor, Tensor]],
    offset: int,
    normalize: bool,
    neg: tuple[Tensor, Tensor],
    teacher_neg: tuple[Tensor, Tensor],
    d_neg: tuple[Tensor, Tensor],
    d_pos: tuple[Tensor, Tensor],
    d_cosine: tuple[Tensor, Tensor],
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of the student's image, text and scale, each None if `needs` is False for it.

    Statistics and derivatives are pairs, of the rows and of the columns, as the reference's `distill_bwd` defines them.
    It takes 6 M N D operations, and 2 M N D_t for every teacher.
    """
    image, text, scale = student
    models = [model_of(*x, offset, normalize) for x in (student, *teachers)]
    own, one = models[0], torch.ones_like(scale)
    gain = _gain([*d_neg, *d_pos], d_cosine, scale)
    sides = [_sides(own, own, neg, d_neg, gain, scale)]
    for k, model in enumerate(models[1:]):
        lse, d = ((rows[k], cols[k]) for rows, cols in (teacher_neg, d_cosine))
        sides.append(_sides(model, own, lse, d, gain, one))
    (M, D), N, x = image.shape, len(text), own.rows.x
    # The weights are stored in fp32 first, which takes twice their size
    block = block_size(x.new_empty(0, dtype=torch.float64), M, N, D)
    launches = [TileLaunch(distill_bwd_kernel, model.rows.x, model.rows.x.shape[1], {}) for model in models]
    gradients = Gradients(own.rows, own.cols, D, block, tuple(one.tile for one in launches))
    part = x.new_zeros(gradients.tile_parts + gradients.finish_parts, dtype=torch.float32)
    wide = None if x.dtype == torch.float32 else x.new_empty(block, dtype=torch.float32)

    def weigh(i0: int, i1: int, j0: int, j1: int, weights: Tensor, part: Tensor) -> None:
        shape, out = (i1 - i0, j1 - j0), weights if wide is None else wide
        for k, (model, (row, col), one) in enumerate(zip(models, sides, launches)):
            a, b = model.rows.x[i0:i1], model.cols.x[j0:j1]
            place: Matrix = matrix(out)
            arguments = row.part(i0), col.part(j0), model.constants, place, part, *shape, a.shape[1], offset + i0 - j0
            launch(one.kernel, one.programs(*shape), *one.operands(a, b), *arguments, **one.options, ADD=k > 0)
        if out is not weights:
            weights.copy_(out)

    pos = [d.double() for d in d_pos]
    pairs = pos[0] + _at_partners(pos[1], M, offset), pos[1] + _at_partners(pos[0], N, -offset)
    vectors = _vectors(own, (scale * pairs[0], scale * pairs[1]), gain, normalize)
    d_image = torch.empty_like(image, memory_format=torch.contiguous_format) if needs[0] else None
    d_text = torch.empty_like(text, memory_format=torch.contiguous_format) if needs[1] else None
    gradients.compute(weigh, *vectors, offset, part, d_image, d_text)
    if not needs[2]:
        return d_image, d_text, None
    cosine = torch.linalg.vecdot(x.float(), _at_partner_rows(own.cols.x, M, offset).float())
    cosine = cosine.double() * own.rows.factor * _at_partners(own.cols.factor, M, offset)
    d_scale = part[: gradients.tile_parts].double().sum() / gain + (pairs[0] * cosine).sum()
    return d_image, d_text, d_scale.to(scale.dtype)


def _at_partner_rows(x: Tensor, size: int, offset: int) -> Tensor:
    """Return the rows k + offset of x for every k in range(size), or any row where there is none."""
    return x[(torch.arange(size, device=x.device) + offset).clamp(0, len(x) - 1)]
