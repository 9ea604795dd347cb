"""The sigmoid loss with its gradients in as few launches as its data flow has steps; see the reference's `sigmoid_fwd`.

Norms with the own pairs, tiles, two products, finish with the sums; backward one product with the loss's gradient. One
way for all problems: pairs, and the M images of a rank with N texts of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from typing import Any

import torch
from fastclip.triton_kernels import planning
from fastclip.triton_kernels.features import copy_sides_kernel, needs_copy
from fastclip.triton_kernels.gradients import ALIGNMENT, OUT, FinishSide, block_size
from fastclip.triton_kernels.launch import Tiles, addmm, cdiv, chunks, output_argument, tile_arguments, workspace_bytes
from fastclip.triton_kernels.planning import cut, plan_of, remember, with_rows
from fastclip.triton_kernels.sequence import Base, Sequence, TileLaunch
from fastclip.triton_kernels.sigmoid_bwd import sigmoid_bwd_kernel
from fastclip.triton_kernels.sigmoid_fwd import (
    sigmoid_bound_kernel,
    sigmoid_finish_kernel,
    sigmoid_fwd_kernel,
    sigmoid_norms_kernel,
)
from fastclip.triton_kernels.tile import CONSTANTS
from torch import Tensor

__all__ = ["sigmoid_bwd", "sigmoid_fwd"]

_PLANES = 4  # of a side's vectors
# Rows, or numbers, of a program, and how much of them it takes at a time
_NORMS = {"BLOCK": 8, "BLOCK_D": 128}
_FINISH = {"BLOCK": 4, "BLOCK_D": 256, "PARTS": 2048}
_PRODUCT = {"BLOCK": 2048}


class _Plan:
    """What follows from a problem's signature: sizes, places in the workspace, launches."""

    def __init__(
        self,
        image: Tensor,
        text: Tensor,
        normalize: bool,
        needs: tuple[bool, ...],
        dtype: torch.dtype,  # of the loss, which the finish is compiled for: part of the signature, and nothing follows
        precision: str,
        tiles: Tiles | None = None,
    ) -> None:
        self.M, self.N, self.D = M, N, D = image.shape[0], text.shape[0], image.shape[1]
        self.weighs = any(needs)
        self.strides = image.stride(0), text.stride(0)
        self.copy = needs_copy(image, normalize) or needs_copy(text, normalize)
        self.width = cdiv(D, 8) * 8 if self.copy else D  # columns that the products see
        self.product_strides = (self.width, self.width) if self.copy else self.strides
        self.row_programs, self.col_programs = (cdiv(size, _NORMS["BLOCK"]) for size in (M, N))
        half = image.dtype is torch.float16
        self.bound = half and not normalize
        self.norms = {"NORMALIZE": normalize, "COPY": self.copy, "HALF": half, "BOUND": self.bound, **_NORMS}
        # Blocks of weights that fit into the workspace; without weights everything is one
        block_m, self.block_n = block_size(image, M, N, D) if self.weighs else (M, N)
        self.rows, self.columns = chunks(M, block_m), chunks(N, self.block_n)
        self.block_m = min(block_m, M)  # rows of a product
        flags = {"GRADIENTS": self.weighs}
        self.tile = TileLaunch(
            *(sigmoid_fwd_kernel, "sigmoid_fwd", image, (M, N), self.width, precision),
            flags,
            None if tiles is None else tiles.config("sigmoid_fwd", self.block_m, min(self.block_n, N), False),
        )
        if not self.weighs:
            block_m = self.block_n = ALIGNMENT  # an argument, which nobody writes to
        self.tile_parts = sum(self.tile.tiles(i1 - i0, j1 - j0) for i0, i1 in self.rows for j0, j1 in self.columns)
        self.parts = self.tile_parts + self.row_programs
        self._cut(image.element_size(), block_m, needs)
        # Of several blocks each has arguments of its own, and work enough for the host not to count
        self.sequence = Sequence(len(self.rows) == len(self.columns) == 1 and tiles is None)

    def _cut(self, size: int, block_m: int, needs: tuple[bool, ...]) -> None:
        """Bytes at which the parts of the workspace begin."""
        M, N, width = self.M, self.N, self.width
        starts = cut(
            size * block_m * self.block_n,  # blocks are whole tiles
            4 * self.block_m * width * needs[0],
            4 * N * width * needs[1],
            size * M * width * self.copy,
            size * N * width * self.copy,
            4 * CONSTANTS,
            4 * _PLANES * M,
            4 * _PLANES * N,
            4 * (self.row_programs + self.col_programs) * self.bound,
            24 * self.parts,
        )
        _, raw_image, raw_text, row_copy, col_copy, self.constants, *starts = starts
        self.row_vec, self.col_vec, self.top, self.part, end = starts
        self.raw_image, self.raw_text = raw_image // 4, raw_text // 4  # in numbers, as all that products see
        self.copies = row_copy // size, col_copy // size
        self.elements = end // size


def _start_norms(
    plan: _Plan,
    start: Any,
    features: tuple[Any, ...],
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    offset: int,
    w: Any,
    wide: Any,
) -> None:
    """Vectors, constants and the own pairs' shares, in the workspace at `w`; rows `x` and `y` where they are copies."""
    M, N, D, programs = plan.M, plan.N, plan.D, plan.row_programs + plan.col_programs
    constants, row_vec, col_vec, top = w + plan.constants, w + plan.row_vec, w + plan.col_vec, w + plan.top
    part = wide + (plan.part + 8 * plan.tile_parts)
    arguments: tuple[Any, ...] = *features, scale, bias, constants, row_vec, col_vec, top, part, plan.parts
    start(sigmoid_norms_kernel, programs, (*arguments, M, N, D, offset), plan.norms)
    if plan.bound:
        arguments = top, constants, scale, bias, plan.row_programs, plan.col_programs
        start(sigmoid_bound_kernel, 1, arguments, {"BLOCK": 1024})
    if plan.copy:
        powers = w + (plan.row_vec + 4 * OUT.value * M), w + (plan.col_vec + 4 * OUT.value * N)
        start(copy_sides_kernel, programs, (*features, *powers, x, y, plan.width, M, N, D), _NORMS)


def _finishing(sums: bool, rows: int, columns: int) -> int:
    """Programs of the finish."""
    return sums + cdiv(rows, _FINISH["BLOCK"]) + cdiv(columns, _FINISH["BLOCK"])


def sigmoid_fwd(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    offset: int,
    normalize: bool,
    divisor: int,
    needs: Ordered[bool],
    saved_dtype: torch.dtype,
    dtype: torch.dtype,
    tiles: Tiles | None = None,
) -> tuple[Tensor | None, ...]:
    """As the reference's `sigmoid_fwd`, the loss of `dtype`, the features' gradients of `saved_dtype`, scale, bias and
    their gradients () fp32: 6 M N D operations with gradients, 2 without, no host synchronisation.

    Three launches and two products of the library; one launch more for float16 features that are not normalised, and
    one for rows that the products cannot take as they lie. `tiles`: other kernels for the pairs.
    """
    needs_image, needs_text, needs_scale, needs_bias = needs = tuple(needs)
    if tiles is None:
        about = normalize, needs, dtype
        plan, image, text = plan_of(_Plan, image, text, scale, about, workspace_bytes())
    else:
        image, text = with_rows(image, text)
        plan = _Plan(image, text, normalize, needs, dtype, "ieee", tiles)
    M, N, D, width = plan.M, plan.N, plan.D, plan.width
    new = image.new_empty
    d_image = new((M, D), dtype=saved_dtype) if needs_image else None
    d_text = new((N, D), dtype=saved_dtype) if needs_text else None
    scalars = needs_scale or needs_bias
    loss = new((), dtype=dtype)
    grads = new(2, dtype=torch.float32) if scalars else loss
    work = new(plan.elements)
    words = work.view(torch.float32)
    raw_image = words.as_strided((plan.block_m, width), (width, 1), plan.raw_image) if needs_image else words
    raw_text = words.as_strided((N, width), (width, 1), plan.raw_text) if needs_text else words
    start, known = plan.sequence.begin()
    w: Any
    wide: Any
    if known:
        w = wide = words.data_ptr()
    else:
        w, wide = Base(words), Base(work.view(torch.float64))
    constants, row_vec, col_vec, part = w + plan.constants, w + plan.row_vec, w + plan.col_vec, wide + plan.part

    x, y = image, text
    if plan.copy:
        x, y = (work.as_strided((size, width), (width, 1), at) for size, at in zip((M, N), plan.copies))
    _start_norms(plan, start, (image, text, *plan.strides), x, y, scale, bias, offset, w, wide)
    addresses = (x.data_ptr(), y.data_ptr(), *plan.product_strides) if known else None
    row: Any = raw_image, x, row_vec, x if d_image is None else d_image
    col: Any = raw_text, y, col_vec, y if d_text is None else d_text
    if not known:  # later a tuple will do
        row, col = FinishSide(*row), FinishSide(*col)
    whole, tile, done = plan.sequence.fixed, plan.tile, 0
    for i0, i1 in plan.rows:
        for j0, j1 in plan.columns:
            shape, at = (i1 - i0, j1 - j0), offset + i0 - j0
            block = work.as_strided(shape if plan.weighs else (ALIGNMENT, ALIGNMENT), (plan.block_n, 1), 0)
            factors = w + (plan.row_vec + 4 * i0), w + (plan.col_vec + 4 * j0)  # the first plane
            if tiles is not None:
                stored, parts = block if plan.weighs else None, part[: 3 * plan.parts].view(3, -1)[:, done:]
                inputs = x[i0:i1], y[j0:j1], *factors, constants, at, bias
                tiles.sigmoid_fwd(tile.tile, *inputs, stored, parts)
            else:
                arguments = (
                    *(addresses or tile_arguments(tile.tile, x[i0:i1], y[j0:j1])[0]),
                    *(*factors, constants, bias),
                    *(w if known else output_argument(tile.tile, block, x), plan.block_n),
                    *(wide + (plan.part + 8 * done), plan.parts, *shape, width, at),
                )
                start(tile.kernel, (tile.programs, shape), arguments, tile.options)
            if not whole:
                done += tile.tiles(*shape)
            if d_image is not None:
                addmm(raw_image if whole else raw_image[: i1 - i0], block, y if whole else y[j0:j1], j0 > 0)
            if d_text is not None:
                addmm(raw_text if whole else raw_text[j0:j1], block.T, x if whole else x[i0:i1], i0 > 0)
        last = i1 == M
        rows, columns = needs_image * (i1 - i0), (needs_text and last) * N
        if rows or columns or last:
            arguments = (
                *(row, col, width, *plan.product_strides, constants, part, loss, grads),
                *(plan.tile_parts, plan.parts, divisor, i0, rows, M, N, D, offset),
            )
            options = {"SUMS": last, "SCALARS": last and scalars, **_FINISH}
            start(sigmoid_finish_kernel, (_finishing, (last, rows, columns)), arguments, options)
    if not known:
        plan.sequence.keep(start)
    d_scale, d_bias = grads[0] if needs_scale else None, grads[1] if needs_bias else None
    return loss, d_image, d_text, d_scale, d_bias


def _multiplying(image_size: int, text_size: int, scalars: bool) -> int:
    """Programs of the backward."""
    return cdiv(image_size, _PRODUCT["BLOCK"]) + cdiv(text_size, _PRODUCT["BLOCK"]) + scalars


def sigmoid_bwd(
    inputs: Ordered[Tensor], kept: Ordered[Tensor | None], d_loss: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As the reference's `sigmoid_bwd`: gradients that `sigmoid_fwd` returned, contiguous, times d_loss (), in one
    launch; one more for a d_loss that is not fp32."""
    image, text = inputs[0], inputs[1]
    if d_loss.dtype is not torch.float32:
        d_loss = d_loss.float()
    d_image, d_text, d_scale, d_bias = kept
    new = image.new_empty
    out_image = None if d_image is None else new(image.shape)
    out_text = None if d_text is None else new(text.shape)
    # Apart, because users change them in place
    out_scale = None if d_scale is None else new((), dtype=torch.float32)
    out_bias = None if d_bias is None else new((), dtype=torch.float32)
    # What is not wanted is not read: any tensor stands in its place
    first, second = d_loss if d_image is None else d_image, d_loss if d_text is None else d_text
    sizes = 0 if d_image is None else d_image.numel(), 0 if d_text is None else d_text.numel()
    missing = d_scale is None, d_bias is None
    aligned = first.data_ptr() % 16, second.data_ptr() % 16
    key = sigmoid_bwd, image.device, image.dtype, first.dtype, second.dtype, aligned, sizes, missing
    sequence = planning.plans.get(key) or remember(key, Sequence(True))
    start, known = sequence.begin()
    arguments = (
        *(first, second, d_loss if d_scale is None else d_scale, d_loss if d_bias is None else d_bias, d_loss),
        *(first if out_image is None else out_image, second if out_text is None else out_text),
        *(d_loss if out_scale is None else out_scale, d_loss if out_bias is None else out_bias, *sizes),
    )
    flags = {"SCALE": d_scale is not None, "BIAS": d_bias is not None, **_PRODUCT}
    scalars = d_scale is not None or d_bias is not None
    start(sigmoid_bwd_kernel, (_multiplying, (*sizes, scalars)), arguments, flags)
    if not known:
        sequence.keep(start)
    return out_image, out_text, out_scale, out_bias
