"""The plain case backward: the finish, which multiplies the upstream gradient in; all before it is for upstream 1."""

from __future__ import annotations

import triton
import triton.language as tl
from fastclip.triton_kernels.gradients import finish_rows, in_two, total_of
from fastclip.triton_kernels.plain_fwd import DIAGONAL_SHARE, plane_of
from fastclip.triton_kernels.tile import GAIN, REPAIR, SCALE

__all__ = ["plain_finish_kernel"]


@triton.jit
def _scale_gradient(part_ptr, fast_parts, exact_parts, constants_ptr, out_ptr, factor, BLOCK: tl.constexpr):
    """d_scale from the shares of the tiles that were computed and of the own pairs, times `factor`, fp64."""
    parts = fast_parts
    if tl.load(constants_ptr + REPAIR) != 0:
        parts = exact_parts
    total = total_of(part_ptr, 0, parts, BLOCK) + tl.load(constants_ptr + DIAGONAL_SHARE).to(tl.float64)
    tl.store(out_ptr, (total * factor).to(tl.float32))


@triton.jit(do_not_specialize=["upstream_ptr", "fast_parts", "exact_parts", "i0", "rows", "N"])
def plain_finish_kernel(
    row,  # a `FinishSide`; raw (rows, ...) is of the images from i0 on
    col,
    constants_ptr,
    upstream_ptr,  # () fp32: the loss's derivative
    part_ptr,  # fp32: the tiles' shares of d_scale; read with SCALE, as all that follows
    d_scale_ptr,  # () fp32
    fast_parts,  # how many there are without a repair
    exact_parts,  # and with one
    i0,
    rows,
    N,
    D,
    D_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Gradients from the sums of weights times features, as `finish_kernel`, times the upstream gradient; d_scale.

    Math      out = upstream s (g - u <u, g>) r_k / gain, g_k = raw_k + own_k r_k c_k other_k;
              d_scale = upstream (sum of tiles + sum of own pairs) / gain
    Program   with D_SCALE the first adds up d_scale; BLOCK of `rows` images, or after them of all texts; twice over D
    Traffic   reads raw, x, other twice, writes out
    Precision fp32, d_scale fp64; upstream and gain meet before the one rounding to the features' dtype, so that a loss
              scaler's factor reaches what would flush
    Ragged    rows beyond the last and the D tail load as 0
    Order     one program a row: bitwise repeatable. The tiles' shares are complete before this launch, and the own
              pairs' are the forward's: d_scale needs no ticket
    """
    upstream = tl.load(upstream_ptr).to(tl.float64) / tl.load(constants_ptr + GAIN).to(tl.float64)
    factor, power = in_two(upstream * tl.load(constants_ptr + SCALE).to(tl.float64))
    block, blocks = tl.program_id(0), tl.cdiv(rows, BLOCK)
    if D_SCALE:
        block -= 1
    plane = plane_of(N)
    if block < 0:
        _scale_gradient(part_ptr, fast_parts, exact_parts, constants_ptr, d_scale_ptr, upstream, PARTS)
    elif block < blocks:
        finish_rows(
            row, col, i0, block * BLOCK, rows, plane, plane, D, 0, 1.0, factor, power, True, True, BLOCK, BLOCK_D
        )  # fmt: skip
    else:
        first = (block - blocks) * BLOCK
        finish_rows(col, row, 0, first, N, plane, plane, D, 0, 1.0, factor, power, True, True, BLOCK, BLOCK_D)
