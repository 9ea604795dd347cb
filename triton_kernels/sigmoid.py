"""Host code of the sigmoid loss, which computes the loss and its gradients in one forward pass.

The weight of a pair depends on no sum over other pairs, so the forward can store weights right away. Its steps are the
norms with the diagonal pairs, the tiles, two products, and a finish that adds up the scalars. The backward multiplies
the gradients by the upstream gradient. The same code serves N pairs of one process and M images of a rank with the N
texts of all ranks, and labels and limits besides.

As in `plain.py`, a `Sequence` replays the launches of a signature from addresses. `w` and `wide` are the start of the
workspace as fp32 and as fp64, tensors on the first call and integers later. `base + n` is n bytes further.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from fastclip.triton_kernels import planning
from fastclip.triton_kernels.features import NORMS, copy_sides_kernel, needs_copy
from fastclip.triton_kernels.gradients import (
    ALIGNMENT,
    FINISH,
    OUT,
    FinishSide,
    add_products,
    block_size,
    finish_programs,
)
from fastclip.triton_kernels.launch import Matrix, PairSide, TileLaunch, Tiles, chunks, with_rows
from fastclip.triton_kernels.planning import cut, plan_of, remember
from fastclip.triton_kernels.sequence import Base, Sequence
from fastclip.triton_kernels.sigmoid_bwd import sigmoid_bwd_kernel
from fastclip.triton_kernels.sigmoid_fwd import (
    sigmoid_bound_kernel,
    sigmoid_finish_kernel,
    sigmoid_fwd_kernel,
    sigmoid_norms_kernel,
)
from fastclip.triton_kernels.tile import CONSTANTS
from torch import Tensor

from fastclip.system import env
from fastclip.system.rounding import ceil_div

__all__ = ["sigmoid_bwd", "sigmoid_fwd"]

_PLANES = 4  # planes of each side's vectors
_PARTS = 2048  # partial sums added per step
_PRODUCT = {"BLOCK": 2048}  # elements per program of the backward
_Sides = tuple[Tensor, Tensor]  # vectors of the images (M,) and of the texts (N,)


class _Plan:
    """Sizes, layout of the workspace and launches of a problem, as far as its signature determines them."""

    def __init__(
        self,
        image: Tensor,
        text: Tensor,
        normalize: bool,
        needs: tuple[bool, ...],
        dtype: torch.dtype,  # of the loss; unused here, but the finish is compiled for it, so it is in the signature
        tiles: Tiles | None = None,
        flags: tuple[bool, bool, bool] = (False, False, False),  # labels, exclude_self, limits
    ) -> None:
        self.labels, exclude_self, limits = flags
        self.beside = self.labels or limits  # the tiles read labels or limits
        self.M, self.N, self.D = M, N, D = image.shape[0], text.shape[0], image.shape[1]
        self.weighs = any(needs)
        self.strides = image.stride(0), text.stride(0)
        self.copy = needs_copy(image, normalize) or needs_copy(text, normalize)
        self.width = ceil_div(D, 8) * 8 if self.copy else D  # columns that the products read
        self.product_strides = (self.width, self.width) if self.copy else self.strides
        self.row_programs, self.col_programs = (ceil_div(size, NORMS["BLOCK"]) for size in (M, N))
        half = image.dtype is torch.float16
        self.bound = half and not normalize and not self.labels
        self.norms = {"NORMALIZE": normalize, "COPY": self.copy, "HALF": half, "BOUND": self.bound, **NORMS}
        self.norms["LABELS"] = self.labels
        # Blocks whose weights fit into the workspace. Without gradients no weights are stored: one block is enough.
        block_m, self.block_n = block_size(image, M, N, D) if self.weighs else (M, N)
        self.rows, self.columns = chunks(M, block_m), chunks(N, self.block_n)
        self.block_m = min(block_m, M)  # rows of a product
        tile = tiles.config("sigmoid_fwd", self.block_m, min(self.block_n, N), False) if tiles else None
        of_tile = {"GRADIENTS": self.weighs, "LABELS": self.labels, "EXCLUDE_SELF": exclude_self, "LIMITS": limits}
        self.tile = TileLaunch(sigmoid_fwd_kernel, image, self.width, of_tile, tile)
        if not self.weighs:
            block_m = self.block_n = ALIGNMENT  # shape of a dummy argument that no kernel writes
        self.tile_parts = sum(self.tile.tiles(i1 - i0, j1 - j0) for i0, i1 in self.rows for j0, j1 in self.columns)
        self.parts = self.tile_parts + self.row_programs
        self.work = self._cut(image.element_size(), block_m, needs)
        # Only a problem of one block is replayed. With several, arguments differ from launch to launch, and the GPU is
        # busy long enough to hide the host's work.
        self.whole = len(self.rows) == len(self.columns) == 1 and tiles is None and not self.beside
        self.sequence = Sequence(self.whole)

    def _cut(self, size: int, block_m: int, needs: tuple[bool, ...]) -> SimpleNamespace:
        """Lay out the workspace: raw sums in fp32 words, copies and `end` in feature elements, all else in bytes.

        The units differ because matrix products take views of the workspace and kernels take addresses in it.
        """
        M, N, width = self.M, self.N, self.width
        work = cut(
            weights=size * block_m * self.block_n,  # blocks are whole tiles
            raw_image=4 * self.block_m * width if needs[0] else 0,
            raw_text=4 * N * width if needs[1] else 0,
            image_copy=size * M * width if self.copy else 0,
            text_copy=size * N * width if self.copy else 0,
            constants=4 * CONSTANTS,
            row_vec=4 * _PLANES * M,
            col_vec=4 * _PLANES * N,
            top=4 * (self.row_programs + self.col_programs) if self.bound else 0,
            part=24 * self.parts,
        )
        work.raw_image, work.raw_text = work.raw_image // 4, work.raw_text // 4
        work.image_copy, work.text_copy, work.end = work.image_copy // size, work.text_copy // size, work.end // size
        return work


class _Step(NamedTuple):
    """Values that all launches of one call share."""

    plan: _Plan
    start: Any
    known: bool
    x: Tensor  # (M, width): the images as the products read them
    y: Tensor  # (N, width)
    bias: Tensor
    offset: int
    labels: _Sides | None
    limits: _Sides | None
    w: Any  # the workspace: its address, or a `Base` of fp32
    wide: Any  # the workspace: its address, or a `Base` of fp64

    def diagonal(self) -> int:
        """Return the offset of the pairs that norms and finish compute: with labels there are none."""
        return self.plan.N if self.plan.labels else self.offset

    def beside(self, factor: Any, side: int, first: int, last: int) -> PairSide:
        """Return the vectors of elements `first` to last - 1 of the images (side 0) or texts (side 1) of a block."""
        label, limit = (None if x is None else x[side][first:last] for x in (self.labels, self.limits))
        return PairSide(factor, label, limit)


def _start_norms(step: _Step, image: Tensor, text: Tensor, scale: Tensor) -> None:
    """Start the kernels that write vectors, constants, the diagonal pairs' sums and, if needed, the copies x and y."""
    plan, start, w, bias = step.plan, step.start, step.w, step.bias
    M, N, D, at = plan.M, plan.N, plan.D, plan.work
    matrices: Any = (image, plan.strides[0]), (text, plan.strides[1]), (step.x, plan.width), (step.y, plan.width)
    if not step.known:  # the first launch compiles by field names, later ones accept any tuple
        matrices = [Matrix(*pair) for pair in matrices]
    programs, constants, top = plan.row_programs + plan.col_programs, w + at.constants, w + at.top
    arguments: tuple[Any, ...] = *matrices[:2], scale, bias, constants, w + at.row_vec, w + at.col_vec, top
    arguments = *arguments, step.wide + (at.part + 8 * plan.tile_parts), plan.parts, M, N, D, step.diagonal()
    start(sigmoid_norms_kernel, programs, arguments, plan.norms)
    if plan.bound:
        arguments = top, constants, scale, bias, plan.row_programs, plan.col_programs
        start(sigmoid_bound_kernel, 1, arguments, {"BLOCK": 1024})
    if plan.copy:
        powers = w + (at.row_vec + 4 * OUT.value * M), w + (at.col_vec + 4 * OUT.value * N)
        start(copy_sides_kernel, programs, (*matrices[:2], *powers, *matrices[2:], M, N, D), NORMS)


def _start_pairs(
    step: _Step, addresses: Any, block: Tensor, rows: tuple[int, int], columns: tuple[int, int], done: int,
    tiles: Tiles | None,
) -> None:  # fmt: skip
    """Start the kernel of a block, which computes weights and partial sums. `done` tiles precede the block."""
    plan, w, (i0, i1), (j0, j1) = step.plan, step.w, rows, columns
    at, tile, shape, offset = plan.work, plan.tile, (i1 - i0, j1 - j0), step.offset + i0 - j0
    row, col = w + (at.row_vec + 4 * i0), w + (at.col_vec + 4 * j0)  # FACTOR is the first plane
    if plan.beside:
        row, col = step.beside(row, 0, i0, i1), step.beside(col, 1, j0, j1)
    vectors = row, col, w + at.constants
    if tiles is not None:
        parts = (step.wide + at.part)[: 3 * plan.parts].view(3, -1)[:, done:]
        weights = block if plan.weighs else None
        tiles.sigmoid_fwd(tile.tile, step.x[i0:i1], step.y[j0:j1], *vectors, offset, step.bias, weights, parts)
        return
    matrices = addresses or (*tile.operands(step.x[i0:i1], step.y[j0:j1]), tile.output(block))
    arguments = *matrices[:2], *vectors, step.bias, matrices[2], step.wide + (at.part + 8 * done), plan.parts
    step.start(tile.kernel, (tile.programs, shape), (*arguments, *shape, plan.width, offset), tile.options)


def _start_blocks(
    step: _Step, work: Tensor, d_image: Tensor | None, d_text: Tensor | None, loss: Tensor, grads: Tensor, divisor: int,
    tiles: Tiles | None,
) -> None:  # fmt: skip
    """Start kernels and products of all blocks, and a finish per chunk of rows; the last finish adds up the scalars."""
    plan, known, x, y, w = step.plan, step.known, step.x, step.y, step.w
    M, N, D, width, at, (x_stride, y_stride) = plan.M, plan.N, plan.D, plan.width, plan.work, plan.product_strides
    words = work.view(torch.float32)
    raw_image = None if d_image is None else words.as_strided((plan.block_m, width), (width, 1), at.raw_image)
    raw_text = None if d_text is None else words.as_strided((N, width), (width, 1), at.raw_text)
    # A gradient that is not needed is neither read nor written: any tensor can take its place
    row: Any = (words if raw_image is None else raw_image, width), (x, x_stride)
    col: Any = (words if raw_text is None else raw_text, width), (y, y_stride)
    addresses: Any = None
    if known:
        addresses = x.data_ptr(), y.data_ptr(), w
        if not plan.tile.descriptor:
            addresses = tuple(zip(addresses, (x_stride, y_stride, plan.block_n)))
    else:  # the first launch compiles by field names, later ones accept any tuple
        row, col = [Matrix(*pair) for pair in row], [Matrix(*pair) for pair in col]
    row = *row, w + at.row_vec, x if d_image is None else d_image
    col = *col, w + at.col_vec, y if d_text is None else d_text
    if not known:
        row, col = FinishSide(*row), FinishSide(*col)
    done = 0
    for rows in plan.rows:
        for columns in plan.columns:
            shape = rows[1] - rows[0], columns[1] - columns[0]
            block = work.as_strided(shape if plan.weighs else (ALIGNMENT, ALIGNMENT), (plan.block_n, 1), 0)
            _start_pairs(step, addresses, block, rows, columns, done, tiles)
            if not plan.whole:
                done += plan.tile.tiles(*shape)
            add_products(block, x, y, raw_image, raw_text, rows, columns, plan.whole)
        i0, i1 = rows
        last = i1 == M
        count, texts = 0 if d_image is None else i1 - i0, N if d_text is not None and last else 0
        if count or texts or last:
            arguments: tuple[Any, ...] = row, col, w + at.constants, step.wide + at.part, loss, grads
            arguments = *arguments, plan.tile_parts, plan.parts, divisor, i0, count, M, N, D, step.diagonal()
            options = {"SUMS": last, "SCALARS": last and grads is not loss, **FINISH, "PARTS": _PARTS}
            step.start(sigmoid_finish_kernel, (finish_programs, (last, count, texts)), arguments, options)


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
    labels: _Sides | None = None,
    exclude_self: bool = False,
    limits: _Sides | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the sigmoid loss and the gradients of image, text, scale and bias, each None if `needs` is False for it.

    Formula and arguments are those of the reference's `sigmoid_fwd`. The loss () has `dtype`, the gradients of image
    (M, D) and text (N, D) have `saved_dtype`, and scale, bias and their gradients are () fp32.

    It takes 6 M N D operations with gradients and 2 M N D without. It needs three launches and two library products,
    and the host never waits. Float16 features that are not normalised need one more launch, and so do rows that must be
    copied. tiles: kernels that compute the pairs in place of `sigmoid_fwd_kernel`, without labels and limits.
    """
    needs_image, needs_text, needs_scale, needs_bias = needs = tuple(needs)
    labels, limits = labels and _contiguous(labels, torch.int32), limits and _contiguous(limits, torch.float32)
    if tiles is None:
        about: tuple[Any, ...] = normalize, needs, dtype
        if labels or limits:
            about = *about, None, (labels is not None, exclude_self, limits is not None)
        plan, image, text = plan_of(_Plan, image, text, scale, about, env.workspace_bytes("cuda"))
    else:
        image, text = with_rows(image), with_rows(text)
        plan = _Plan(image, text, normalize, needs, dtype, tiles)
    M, N, D, width, at = plan.M, plan.N, plan.D, plan.width, plan.work
    new = image.new_empty
    d_image = new((M, D), dtype=saved_dtype) if needs_image else None
    d_text = new((N, D), dtype=saved_dtype) if needs_text else None
    loss = new((), dtype=dtype)
    grads = new(2, dtype=torch.float32) if needs_scale or needs_bias else loss
    work = new(at.end)
    x, y = image, text
    if plan.copy:
        x = work.as_strided((M, width), (width, 1), at.image_copy)
        y = work.as_strided((N, width), (width, 1), at.text_copy)
    start, known = plan.sequence.begin()
    w: Any
    wide: Any
    if known:
        w = wide = work.data_ptr()
    else:
        w, wide = Base(work.view(torch.float32)), Base(work.view(torch.float64))
    step = _Step(plan, start, known, x, y, bias, offset, labels, limits, w, wide)
    _start_norms(step, image, text, scale)
    _start_blocks(step, work, d_image, d_text, loss, grads, divisor, tiles)
    if not known:
        plan.sequence.keep(start)
    d_scale, d_bias = grads[0] if needs_scale else None, grads[1] if needs_bias else None
    return loss, d_image, d_text, d_scale, d_bias


def _contiguous(sides: _Sides, dtype: torch.dtype) -> _Sides:
    image, text = sides
    return image.to(dtype).contiguous(), text.to(dtype).contiguous()


def _multiplying(image_size: int, text_size: int, scalars: bool) -> int:
    """Number of programs of the backward: for the elements of both gradients and, if needed, one for the scalars."""
    return ceil_div(image_size, _PRODUCT["BLOCK"]) + ceil_div(text_size, _PRODUCT["BLOCK"]) + scalars


def sigmoid_bwd(
    inputs: Ordered[Tensor], kept: Ordered[Tensor | None], d_loss: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients that `sigmoid_fwd` returned, times the upstream gradient, in the dtypes of the inputs.

    inputs: image and text first. kept: the four gradients, contiguous, or None. d_loss: () upstream
    gradient. This is one launch, and a second one if d_loss must be converted to fp32.
    """
    image, text = inputs[0], inputs[1]
    if d_loss.dtype is not torch.float32:
        d_loss = d_loss.float()
    d_image, d_text, d_scale, d_bias = kept
    new = image.new_empty
    out_image = None if d_image is None else new(image.shape)
    out_text = None if d_text is None else new(text.shape)
    # Two tensors rather than one of two elements, because users may change gradients in place
    out_scale = None if d_scale is None else new((), dtype=torch.float32)
    out_bias = None if d_bias is None else new((), dtype=torch.float32)
    # A gradient that is not needed is not read: any tensor can take its place
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
