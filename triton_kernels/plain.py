"""Host code of the plain case: the mean contrastive loss of N pairs without labels, in as few launches as possible.

Forward: norms, tiles, reduction with the loss, and the two launches of a repair. Backward: weights, their repair, two
products and the finish. The general case computes the loss, its derivatives and the vectors between these steps, in
torch and in further kernels. Here the reduction computes them, because with few rows a step takes as long as the host
needs to start its kernels.

The launches of a signature are the same every time, so a `Sequence` replays them from addresses. The code below
therefore handles tensors on the first call, and integers on later calls (`known` is then True). The names `s`, `w` and
`wide` stand for the start of the saved vectors, of the workspace as fp32 and of the workspace as fp64. `base + n` is n
bytes further in either case.
"""

from __future__ import annotations

from typing import Any

import torch
from fastclip.triton_kernels.contrastive_bwd import contrastive_bwd_kernel
from fastclip.triton_kernels.contrastive_fwd import contrastive_fwd_kernel
from fastclip.triton_kernels.contrastive_fwd_reduce import REDUCED, contrastive_fwd_reduce_kernel
from fastclip.triton_kernels.features import NORMS, bound_kernel, copy_sides_kernel, needs_copy
from fastclip.triton_kernels.gradients import FINISH, OUT, FinishSide, add_products, block_size, finish_programs
from fastclip.triton_kernels.launch import FwdSide, Matrix, TileLaunch, chunks, panels_of
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
from fastclip.triton_kernels.sequence import Base, Sequence
from fastclip.triton_kernels.tile import CONSTANTS
from torch import Tensor

from fastclip.system import env
from fastclip.system.rounding import ceil_div

__all__ = ["plain_bwd", "plain_fwd", "plain_saved"]

# BLOCK: pairs per program. WIDE: vector elements per step of the last program, which brings them to a common gain.
_REDUCTION = {"BLOCK": REDUCED, "WIDE": 4096, "num_warps": 8}
_PARTS = 2048  # partial sums of d_scale added per step
_VEC = 4 * HEADER  # bytes before the vectors
_TICKET = not torch.version.hip  # True if the reduction's last program computes the loss; see `plain_reduce_kernel`


def _plane(N: int) -> int:
    """Number of fp32 words between the planes of the vectors; see `plane_of`."""
    return ceil_div(N, ALIGNED.value) * ALIGNED.value


def plain_saved(N: int) -> int:
    """Number of fp32 words that the forward saves for the backward: the constants and the vectors of both sides."""
    return HEADER + 2 * PLANES * _plane(N)


class _Plan:
    """Sizes, layout of the workspace and launches of a problem, as far as its signature determines them."""

    def __init__(self, image: Tensor, text: Tensor, normalize: bool) -> None:
        self.N, self.D = N, D = image.shape[0], image.shape[1]
        self.plane, self.saved = _plane(N), plain_saved(N)
        self.col_vec = _VEC + 4 * PLANES * self.plane
        self.row_power, self.col_power = (start + 4 * OUT.value * self.plane for start in (_VEC, self.col_vec))
        self.strides = image.stride(0), text.stride(0)
        self.copy = needs_copy(image, normalize) or needs_copy(text, normalize)
        self.width = ceil_div(D, 8) * 8 if self.copy else D  # columns that the products see
        self.product_strides = (self.width, self.width) if self.copy else self.strides
        self.pair_programs, self.reduce_programs = ceil_div(N, NORMS["BLOCK"]), ceil_div(N, REDUCED)
        self._cut_forward(image)
        self._cut_backward(image)
        # Only a problem of one panel and one block is replayed. With several, arguments differ from launch to launch,
        # and the GPU is busy long enough to hide the host's work.
        self.whole = self.one_panel and len(self.rows) == len(self.columns) == 1
        self.fwd = Sequence(self.whole)
        self.bwd: dict[Any, Sequence] = {}  # by the gradients needed and d_loss's alignment

    def _cut_forward(self, x: Tensor) -> None:
        """Cut the rows into panels whose partial sums fit into the workspace, and lay it out (in bytes)."""
        N = self.N
        flags = {"LABELS": False, "EXCLUDE_SELF": False, "MAXIMA": False}
        self.statistics = [
            TileLaunch(contrastive_fwd_kernel, x, self.width, {**flags, "EXACT": exact}) for exact in (False, True)
        ]
        panel, tiles_n, tiles_m = panels_of([statistics.tile for statistics in self.statistics], N, N, planes=1)
        self.panels = chunks(N, panel)
        self.one_panel = panel == N
        self.tiles = [statistics.shape(N, N) for statistics in self.statistics]
        self.descriptors = self.statistics[0].descriptor
        self.fwd_work = cut(
            tickets=64,
            cos=8 * self.plane,
            lse=16 * self.plane,
            share=24 * self.reduce_programs,
            top=8 * self.pair_programs,
            row_part=8 * tiles_n * panel,
            col_part=8 * tiles_m * N,
        )

    def _cut_backward(self, x: Tensor) -> None:
        """Cut the logits into blocks whose weights fit into the workspace, and lay it out (in fp32 words)."""
        N, size = self.N, x.element_size()
        block_m, self.block_n = block_size(x, N, N, self.D)
        self.rows, self.columns = chunks(N, block_m), chunks(N, self.block_n)
        flags = {"LABELS": False, "EXCLUDE_SELF": False}
        self.weighing = [
            TileLaunch(contrastive_bwd_kernel, x, self.width, {**flags, "EXACT": exact}) for exact in (False, True)
        ]
        blocks = [(i1 - i0, j1 - j0) for i0, i1 in self.rows for j0, j1 in self.columns]
        self.parts = [sum(weighing.tiles(*block) for block in blocks) for weighing in self.weighing]
        self.block_m = min(block_m, N)  # rows of a product
        # The raw sums follow the weights of a block, which is padded to whole tiles
        self.raw_image = block_m * self.block_n * size // 4
        self.raw_text = self.raw_image + self.block_m * self.width
        self.part = ceil_div(self.raw_text + N * self.width, 16) * 16
        self.bwd_elements = (self.part + max(self.parts)) * 4 // size


def _start_copies(
    plan: _Plan, start: Any, known: bool, image: Tensor, text: Tensor, x: Tensor, y: Tensor, s: Any
) -> None:
    """Start the copy of both features to x, y (N, width), times the powers of two that are saved at `s`."""
    pairs: Any = (image, plan.strides[0]), (text, plan.strides[1]), (x, plan.width), (y, plan.width)
    image_matrix, text_matrix, *copies = pairs if known else [Matrix(*pair) for pair in pairs]
    powers = s + plan.row_power, s + plan.col_power
    arguments = image_matrix, text_matrix, *powers, *copies, plan.N, plan.N, plan.D
    start(copy_sides_kernel, 2 * plan.pair_programs, arguments, NORMS)


def _start_panels(
    plan: _Plan, start: Any, statistics: TileLaunch, x: Tensor, y: Tensor, addresses: Any, s: Any, constants: Any,
    parts: tuple[Any, Any], wide: Any,
) -> None:  # fmt: skip
    """Start the kernels of the partial sums and, if there are several panels, of their reduction into the workspace."""
    N, operands, lse = plan.N, addresses, plan.fwd_work.lse
    col: Any = s + plan.col_vec, None, parts[1]  # FACTOR is the first plane; no labels
    for i0, i1 in plan.panels:
        row: Any = s + (_VEC + 4 * i0), None, parts[0]
        if not addresses:
            operands, row, col = statistics.operands(x[i0:i1], y), FwdSide(*row), FwdSide(*col)
        arguments: tuple[Any, ...] = *operands, row, col, constants, i1 - i0, N, plan.width, i0
        start(statistics.kernel, (statistics.programs, (i1 - i0, N)), arguments, statistics.options)
        if not plan.one_panel:
            shape = *statistics.shape(i1 - i0, N), i1 - i0, N, i0, int(i0 == 0), int(i1 == N)
            arguments = *parts, wide + (lse + 8 * i0), wide + (lse + 8 * plan.plane), N, N, constants, *shape
            exact = statistics.options["EXACT"]
            flags = {"LABELS": False, "EXACT": exact, "MAXIMA": False, "BLOCK": REDUCED, "TILES": 8}
            programs = ceil_div(i1 - i0, REDUCED) + plan.reduce_programs
            start(contrastive_fwd_reduce_kernel, programs, arguments, flags)


def plain_fwd(
    image: Tensor, text: Tensor, scale: Tensor, image_weight: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Return the loss () of image, text (N, D), and the fp32 vector (`plain_saved(N)`,) that the backward needs.

    The loss is w mean_i softplus(row_neg_i - row_pos_i) + (1 - w) mean_j softplus(col_neg_j - col_pos_j) with w =
    `image_weight`. It takes 2 N^2 D operations in five launches, without host synchronisation. Features that are not
    normalised need one more launch, and so do rows that must be copied.
    """
    plan, image, text = plan_of(_Plan, image, text, scale, (normalize,), env.workspace_bytes("cuda"))
    N, D, pairs, at = plan.N, plan.D, plan.pair_programs, plan.fwd_work
    new = image.new_empty
    saved, loss = new(plan.saved, dtype=torch.float32), new((), dtype=torch.float32)
    work = new(at.end // 4, dtype=torch.float32)
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
    constants, vec, top = s if known else saved[:CONSTANTS], s + _VEC, w + at.top
    cos, share, lse = wide + at.cos, wide + at.share, wide + at.lse
    features: Any = (image, plan.strides[0]), (text, plan.strides[1])
    addresses: Any = None
    if known:
        addresses = x.data_ptr(), y.data_ptr()
        if not plan.descriptors:
            addresses = tuple(zip(addresses, plan.product_strides))
    else:  # the first launch compiles by field names, later ones accept any tuple
        features = [Matrix(*pair) for pair in features]

    arguments: tuple[Any, ...] = *features, scale, constants, vec, cos, top, tickets + at.tickets, N, D
    start(plain_norms_kernel, pairs, arguments, {"NORMALIZE": normalize, "COPY": plan.copy, **NORMS})
    if not normalize:
        start(bound_kernel, 1, (top, constants, scale, pairs, pairs), {"BLOCK": 1024})
    if plan.copy:
        _start_copies(plan, start, known, image, text, x, y, s)
    for exact, statistics in enumerate(plan.statistics):
        base = wide if exact else w
        parts = base + at.row_part, base + at.col_part
        _start_panels(plan, start, statistics, x, y, addresses, s, constants, parts, wide)
        ticket = tickets + (at.tickets + 4 * exact)
        arguments = *parts, lse, cos, vec, share, ticket, constants, loss, *plan.tiles[exact], N, image_weight
        flags = {"PARTS": plan.one_panel, "EXACT": exact == 1, "TICKET": _TICKET, "TILES": 16, **_REDUCTION}
        start(plain_reduce_kernel, plan.reduce_programs, arguments, flags)
    if not _TICKET:
        start(plain_loss_kernel, 1, (vec, share, constants, loss, plan.reduce_programs, N), _REDUCTION)
    if not known:
        plan.fwd.keep(start)
    return loss, saved


def _start_weights(
    plan: _Plan, start: Any, x: Tensor, y: Tensor, block: Tensor, addresses: Any, s: Any, constants: Any, w: Any,
    parts: list[int], rows: tuple[int, int], columns: tuple[int, int],
) -> None:  # fmt: skip
    """Start the two kernels that compute the weights of a block: the fast one and the repair.

    parts: where the two kernels store their partial sums of d_scale, in bytes from `w` on. Each call advances them.
    """
    (i0, i1), (j0, j1) = rows, columns
    shape = i1 - i0, j1 - j0
    vec = s + (_VEC + 4 * i0), s + (plan.col_vec + 4 * j0), plan.plane, plan.plane
    for exact, weighing in enumerate(plan.weighing):
        matrices = addresses or (*weighing.operands(x[i0:i1], y[j0:j1]), weighing.output(block))
        arguments = *matrices[:2], *vec, constants, matrices[2], w + parts[exact], *shape, plan.width, i0 - j0
        start(weighing.kernel, (weighing.programs, shape), arguments, weighing.options)
        if not plan.whole:
            parts[exact] += 4 * weighing.tiles(*shape)


def _start_blocks(
    plan: _Plan, start: Any, known: bool, x: Tensor, y: Tensor, work: Tensor, s: Any, d_loss: Tensor,
    constants: Any, d_image: Tensor | None, d_text: Tensor | None, d_scale: Tensor | None,
) -> None:  # fmt: skip
    """Start kernels and products of all blocks, and a finish per chunk of rows; the last finish adds up d_scale."""
    N, width, (x_stride, y_stride) = plan.N, plan.width, plan.product_strides
    words = work.view(torch.float32)
    raw_image = words.as_strided((plan.block_m, width), (width, 1), plan.raw_image)
    raw_text = words.as_strided((N, width), (width, 1), plan.raw_text)
    # A gradient that is not needed is not written, so any tensor can take its place
    row: Any = (raw_image, width), (x, x_stride), s + _VEC, x if d_image is None else d_image
    col: Any = (raw_text, width), (y, y_stride), s + plan.col_vec, y if d_text is None else d_text
    addresses: Any = None
    w: Any
    if known:
        w = work.data_ptr()
        addresses = x.data_ptr(), y.data_ptr(), w
        if not plan.descriptors:
            addresses = tuple(zip(addresses, (x_stride, y_stride, plan.block_n)))
    else:  # the first launch compiles by field names, later ones accept any tuple
        w = Base(words)
        row, col = (FinishSide(Matrix(*raw), Matrix(*rows), *others) for raw, rows, *others in (row, col))
    raw = None if d_image is None else raw_image, None if d_text is None else raw_text
    parts = [4 * plan.part, 4 * plan.part]
    for rows in plan.rows:
        for columns in plan.columns:
            block = work.as_strided((rows[1] - rows[0], columns[1] - columns[0]), (plan.block_n, 1), 0)
            _start_weights(plan, start, x, y, block, addresses, s, constants, w, parts, rows, columns)
            add_products(block, x, y, *raw, rows, columns, plan.whole)
        i0, i1 = rows
        last = i1 == N
        count, texts = 0 if d_image is None else i1 - i0, N if d_text is not None and last else 0
        sums = d_scale is not None and last
        if count or texts or sums:
            arguments: tuple[Any, ...] = row, col, constants, d_loss, w + 4 * plan.part
            arguments = *arguments, constants if d_scale is None else d_scale, *plan.parts, i0, count, N, plan.D
            options = {"D_SCALE": sums, **FINISH, "PARTS": _PARTS}
            start(plain_finish_kernel, (finish_programs, (sums, count, texts)), arguments, options)


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
    """Return the gradients of image, text (N, D), in their dtype, and of scale () in fp32, each None unless needed.

    saved: the vector that `plain_fwd` returned. d_loss: () fp32, the upstream gradient. It takes 6 N^2 D operations.
    If all weights fit into the workspace, these are three launches and two products of the library, and one more launch
    if rows must be copied.
    """
    needs_image, needs_text, needs_scale = needs
    if not (needs_image or needs_text or needs_scale):
        return None, None, None
    plan, image, text = plan_of(_Plan, image, text, scale, (normalize,))
    new = image.new_empty
    d_image = new((plan.N, plan.D)) if needs_image else None
    d_text = new((plan.N, plan.D)) if needs_text else None
    d_scale = new((), dtype=torch.float32) if needs_scale else None
    work = new(plan.bwd_elements)
    kind = *needs, d_loss.data_ptr() % 16
    try:
        sequence = plan.bwd[kind]
    except KeyError:
        sequence = plan.bwd[kind] = Sequence(plan.whole)
    start, known = sequence.begin()
    s: Any = saved.data_ptr() if known else Base(saved)
    x, y = image, text
    if plan.copy:
        copies = new((2, plan.N, plan.width))
        x, y = copies[0], copies[1]
        _start_copies(plan, start, known, image, text, x, y, s)
    constants = s if known else saved[:CONSTANTS]
    _start_blocks(plan, start, known, x, y, work, s, d_loss, constants, d_image, d_text, d_scale)
    if not known:
        sequence.keep(start)
    return d_image, d_text, d_scale
