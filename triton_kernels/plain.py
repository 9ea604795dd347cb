"""The plain case, N pairs whose only positives are each other's, in as few launches as its data flow has steps.

Forward: norms, tiles, reduction with the loss, repair, its reduction. Backward: weights, repair, two products, finish.
What lies between these in the general case (the loss in torch, its derivatives, the vectors) is part of the reduction,
because with few rows users wait for the host and not for the GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from fastclip.triton_kernels.contrastive_bwd import contrastive_bwd_kernel, contrastive_bwd_repair_kernel
from fastclip.triton_kernels.contrastive_fwd import (
    contrastive_fwd_kernel,
    contrastive_fwd_repair_kernel,
)
from fastclip.triton_kernels.contrastive_fwd_reduce import REDUCED, contrastive_fwd_reduce_kernel
from fastclip.triton_kernels.features import bound_kernel, copy_sides_kernel, needs_copy
from fastclip.triton_kernels.gradients import OUT, FinishSide, block_size
from fastclip.triton_kernels.launch import (
    addmm,
    cdiv,
    chunks,
    output_argument,
    tile_arguments,
    workspace_bytes,
)
from fastclip.triton_kernels.plain_bwd import plain_finish_kernel
from fastclip.triton_kernels.plain_fwd import (
    ALIGNED,
    HEADER,
    PLANES,
    plain_loss_kernel,
    plain_norms_kernel,
    plain_reduce_kernel,
)
from fastclip.triton_kernels.planning import cut, plan_of
from fastclip.triton_kernels.sequence import Base, Sequence, TileLaunch
from fastclip.triton_kernels.tile import CONSTANTS
from torch import Tensor

__all__ = ["plain_bwd", "plain_fwd", "plain_saved"]

# Pairs, or rows, of a program, and how much of them it takes at a time
_NORMS = {"BLOCK": 8, "BLOCK_D": 128}
_REDUCTION = {"BLOCK": REDUCED, "WIDE": 4096, "num_warps": 8}
_FINISH = {"BLOCK": 4, "BLOCK_D": 256, "PARTS": 2048}
_VEC = 4 * HEADER  # bytes before the vectors
_TICKET = not torch.version.hip  # whether the reduction may end with the loss; see `plain_reduce_kernel`


def _plane(N: int) -> int:
    """Words between the planes of the vectors; see `plane_of`."""
    return cdiv(N, ALIGNED.value) * ALIGNED.value


def plain_saved(N: int) -> int:
    """Words of fp32 that the forward hands to the backward: constants, and the vectors of both sides."""
    return HEADER + 2 * PLANES * _plane(N)


class _Plan:
    """What follows from a problem's signature: sizes, places in the workspace, launches."""

    def __init__(self, image: Tensor, text: Tensor, normalize: bool, precision: str) -> None:
        self.N, self.D = N, D = image.shape[0], image.shape[1]
        self.plane, self.saved = _plane(N), plain_saved(N)
        self.col_vec = _VEC + 4 * PLANES * self.plane
        self.row_power, self.col_power = (start + 4 * OUT.value * self.plane for start in (_VEC, self.col_vec))
        self.strides = image.stride(0), text.stride(0)
        self.copy = needs_copy(image, normalize) or needs_copy(text, normalize)
        self.width = cdiv(D, 8) * 8 if self.copy else D  # columns that the products see
        self.product_strides = (self.width, self.width) if self.copy else self.strides
        self.pair_programs, self.reduce_programs = cdiv(N, _NORMS["BLOCK"]), cdiv(N, REDUCED)
        self._cut_forward(image, precision)
        self._cut_backward(image, precision)
        # Of several panels or blocks each has arguments of its own, and work enough for the host not to count
        self.whole = len(self.panels) == len(self.rows) == len(self.columns) == 1
        self.fwd = Sequence(self.whole)
        self.bwd: dict[Any, Sequence] = {}  # by the gradients that are asked for, and the upstream's alignment

    def _cut_forward(self, x: Tensor, precision: str) -> None:
        """Panels of rows whose partial sums fit into the workspace; bytes at which its parts begin."""
        N = self.N
        flags = {"LABELS": False, "EXCLUDE_SELF": False}
        self.statistics = (
            TileLaunch(contrastive_fwd_kernel, "contrastive_fwd", x, (N, N), self.width, precision, flags),
            TileLaunch(
                *(contrastive_fwd_repair_kernel, "contrastive_fwd_repair", x, (N, N), self.width, precision),
                {**flags, "MAXIMA": False},
            ),
        )
        tiles = [statistics.tile for statistics in self.statistics]
        row_bytes = 8 * max(cdiv(N, tile.BLOCK_N) + N / tile.BLOCK_M for tile in tiles)
        step = max(tile.BLOCK_M for tile in tiles)
        panel = min(max(int(workspace_bytes() / row_bytes) // step, 1) * step, N)
        self.panels = chunks(N, panel)
        across = max(cdiv(N, tile.BLOCK_N) for tile in tiles), max(cdiv(panel, tile.BLOCK_M) for tile in tiles)
        sizes = (64, 8 * self.plane, 16 * self.plane, 24 * self.reduce_programs, 8 * self.pair_programs)
        starts = cut(*sizes, 8 * across[0] * panel, 8 * across[1] * N)
        _, self.cos, self.lse, self.share, self.top, self.row_part, self.col_part, end = starts
        self.fwd_words = end // 4

    def _cut_backward(self, x: Tensor, precision: str) -> None:
        """Blocks of weights that fit into the workspace; words at which its parts begin."""
        N, size = self.N, x.element_size()
        block_m, self.block_n = block_size(x, N, N, self.D)
        self.rows, self.columns = chunks(N, block_m), chunks(N, self.block_n)
        flags = {"LABELS": False, "EXCLUDE_SELF": False}
        self.weighing = tuple(
            TileLaunch(kernel, name, x, (N, N), self.width, precision, flags)
            for kernel, name in (
                (contrastive_bwd_kernel, "contrastive_bwd"),
                (contrastive_bwd_repair_kernel, "contrastive_bwd_repair"),
            )
        )
        blocks = [(i1 - i0, j1 - j0) for i0, i1 in self.rows for j0, j1 in self.columns]
        self.parts = [sum(weighing.tiles(*block) for block in blocks) for weighing in self.weighing]
        self.block_m = min(block_m, N)  # rows of a product
        self.raw_image = block_m * self.block_n * size // 4  # blocks are whole tiles
        self.raw_text = self.raw_image + self.block_m * self.width
        self.part = cdiv(self.raw_text + N * self.width, 16) * 16
        self.bwd_elements = (self.part + max(self.parts)) * 4 // size


def plain_fwd(
    image: Tensor, text: Tensor, scale: Tensor, image_weight: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Loss () of image, text (N, D), w mean_i softplus(row_neg_i - row_pos_i) + (1 - w) mean_j of the columns', and
    what the backward needs, fp32 (`plain_saved`,); 2 N^2 D operations in five launches, no host synchronisation.

    One launch more for features that are not normalised, and one for rows that the products cannot take as they lie.
    """
    plan, image, text = plan_of(_Plan, image, text, scale, (normalize,), workspace_bytes())
    N, D, pairs = plan.N, plan.D, plan.pair_programs
    new = image.new_empty
    saved, loss = new(plan.saved, dtype=torch.float32), new((), dtype=torch.float32)
    work = new(plan.fwd_words, dtype=torch.float32)
    x, y = image, text
    if plan.copy:
        copies = new((2, N, plan.width))
        x, y = copies[0], copies[1]
    start, known = plan.fwd.begin()
    s: Any
    w: Any
    wide: Any
    tickets: Any
    if known:
        s, w = saved.data_ptr(), work.data_ptr()
        wide = tickets = w
    else:
        s, w = Base(saved), Base(work)
        wide, tickets = Base(work.view(torch.float64)), Base(work.view(torch.int32))
    constants, row_vec, col_vec = s if known else saved[:CONSTANTS], s + _VEC, s + plan.col_vec
    cos, lse, top = wide + plan.cos, wide + plan.lse, w + plan.top

    features = image, text, *plan.strides
    arguments: tuple[Any, ...] = *features, scale, constants, row_vec, cos, top, tickets + 0, N, D
    start(plain_norms_kernel, pairs, arguments, {"NORMALIZE": normalize, "COPY": plan.copy, **_NORMS})
    if not normalize:
        start(bound_kernel, 1, (top, constants, scale, pairs, pairs), {"BLOCK": 1024})
    if plan.copy:
        powers = s + plan.row_power, s + plan.col_power
        start(copy_sides_kernel, 2 * pairs, (*features, *powers, x, y, plan.width, N, N, D), _NORMS)
    addresses = (x.data_ptr(), y.data_ptr(), *plan.product_strides) if known else None
    for repair, statistics in enumerate(plan.statistics):
        base = wide if repair else w
        parts = base + plan.row_part, base + plan.col_part
        for i0, i1 in plan.panels:
            arguments = (
                *(addresses or tile_arguments(statistics.tile, x[i0:i1], y)[0]),
                *(s + (_VEC + 4 * i0), col_vec, row_vec, col_vec, constants),  # FACTOR is the first plane; no labels
                *(*parts, i1 - i0, N, plan.width, i0),
            )
            start(statistics.kernel, (statistics.programs, (i1 - i0, N)), arguments, statistics.options)
            if len(plan.panels) > 1:
                out = wide + (plan.lse + 8 * i0), wide + (plan.lse + 8 * plan.plane)
                shape = *statistics.shape(i1 - i0, N), i1 - i0, N, i0, int(i0 == 0), int(i1 == N)
                arguments = *parts, *out, N, N, constants, *shape
                flags = {"LABELS": False, "EXACT": bool(repair), "MAXIMA": False, "BLOCK": REDUCED, "TILES": 8}
                programs = cdiv(i1 - i0, REDUCED) + plan.reduce_programs
                start(contrastive_fwd_reduce_kernel, programs, arguments, flags)
        arguments = (
            *(*parts, lse, cos, row_vec, wide + plan.share, tickets + 4 * repair, constants, loss),
            *(*statistics.whole, N, image_weight),
        )
        flags = {"PARTS": len(plan.panels) == 1, "EXACT": repair == 1, "TICKET": _TICKET, "TILES": 16, **_REDUCTION}
        start(plain_reduce_kernel, plan.reduce_programs, arguments, flags)
    if not _TICKET:
        arguments = row_vec, wide + plan.share, constants, loss, plan.reduce_programs, N
        start(plain_loss_kernel, 1, arguments, _REDUCTION)
    if not known:
        plan.fwd.keep(start)
    return loss, saved


def _finishing(sums: bool, rows: int, columns: int) -> int:
    """Programs of the finish."""
    return sums + cdiv(rows, _FINISH["BLOCK"]) + cdiv(columns, _FINISH["BLOCK"])


def plain_bwd(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    saved: Tensor,
    image_weight: float,
    normalize: bool,
    d_loss: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of image, text (N, D), of their dtype, and of scale (), fp32; None where `needs` says so.

    d_loss: () fp32, the upstream gradient. 6 N^2 D operations in three launches, of a problem that fits into the
    workspace, and two products of the library; one launch more for rows that the products cannot take as they lie.
    """
    needs_image, needs_text, needs_scale = needs
    if not (needs_image or needs_text or needs_scale):
        return None, None, None
    plan, image, text = plan_of(_Plan, image, text, scale, (normalize,))
    N, D, width = plan.N, plan.D, plan.width
    new = image.new_empty
    d_image = new((N, D)) if needs_image else None
    d_text = new((N, D)) if needs_text else None
    d_scale = new((), dtype=torch.float32) if needs_scale else None
    work = new(plan.bwd_elements)
    words = work.view(torch.float32)
    raw_image = words.as_strided((plan.block_m, width), (width, 1), plan.raw_image)
    raw_text = words.as_strided((N, width), (width, 1), plan.raw_text)
    kind = *needs, d_loss.data_ptr() % 16
    try:
        sequence = plan.bwd[kind]
    except KeyError:
        sequence = plan.bwd[kind] = Sequence(plan.whole)
    start, known = sequence.begin()
    s: Any = saved.data_ptr() if known else Base(saved)
    w: Any = words.data_ptr() if known else Base(words)
    constants, row_vec, col_vec = s if known else saved[:CONSTANTS], s + _VEC, s + plan.col_vec
    x, y = image, text
    if plan.copy:
        copies = new((2, N, width))
        x, y = copies[0], copies[1]
        powers = s + plan.row_power, s + plan.col_power
        arguments: tuple[Any, ...] = image, text, *plan.strides, *powers, x, y, width, N, N, D
        start(copy_sides_kernel, 2 * plan.pair_programs, arguments, _NORMS)

    addresses = (x.data_ptr(), y.data_ptr(), *plan.product_strides) if known else None
    parts = [4 * plan.part, 4 * plan.part]
    row: Any = raw_image, x, row_vec, x if d_image is None else d_image
    col: Any = raw_text, y, col_vec, y if d_text is None else d_text
    if not known:  # later a tuple will do
        row, col = FinishSide(*row), FinishSide(*col)
    for i0, i1 in plan.rows:
        for j0, j1 in plan.columns:
            shape = i1 - i0, j1 - j0
            block = work.as_strided(shape, (plan.block_n, 1), 0)
            for repair, weighing in enumerate(plan.weighing):
                arguments = (
                    *(addresses or tile_arguments(weighing.tile, x[i0:i1], y[j0:j1])[0]),
                    *(s + (_VEC + 4 * i0), s + (plan.col_vec + 4 * j0), plan.plane, plan.plane, constants),
                    *(w if known else output_argument(weighing.tile, block, x), plan.block_n, w + parts[repair]),
                    *(*shape, width, i0 - j0),
                )
                start(weighing.kernel, (weighing.programs, shape), arguments, weighing.options)
                if not plan.whole:
                    parts[repair] += 4 * weighing.tiles(*shape)
            if d_image is not None:
                addmm(raw_image if plan.whole else raw_image[: i1 - i0], block, y if plan.whole else y[j0:j1], j0 > 0)
            if d_text is not None:
                addmm(raw_text if plan.whole else raw_text[j0:j1], block.T, x if plan.whole else x[i0:i1], i0 > 0)
        last = i1 == N
        rows, columns = needs_image * (i1 - i0), (needs_text and last) * N
        sums = needs_scale and last
        if rows or columns or sums:
            arguments = (
                *(row, col, width, *plan.product_strides, constants, d_loss, w + 4 * plan.part),
                *(constants if d_scale is None else d_scale, *plan.parts, i0, rows, N, D),
            )
            start(plain_finish_kernel, (_finishing, (sums, rows, columns)), arguments, {"D_SCALE": sums, **_FINISH})
    if not known:
        sequence.keep(start)
    return d_image, d_text, d_scale
