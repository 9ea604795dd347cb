"""Kernels of the plain case's forward: norms before the statistics' tiles, and the loss and vectors after them.

In the plain case there are N pairs, and text k is the only positive of image k. One program handles image k and text k
together, because their derivatives add up to the weight of the pair's logit. The vectors are those of
`contrastive_bwd_vectors`, computed for an upstream gradient of 1: (planes, plane) of the images, then of the texts.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastclip.triton_kernels.contrastive_bwd_vectors import (
    NEG,
    NEG_EXACT,
    gain_of,
    guarded_weights,
    largest_finite,
    lowest_safe,
)
from fastclip.triton_kernels.contrastive_fwd_reduce import reduce_plane
from fastclip.triton_kernels.features import (
    bound_of,
    inverse_norm,
    pair_sums,
    set_constants,
    unit_norm,
)
from fastclip.triton_kernels.gradients import DIAGONAL, store_side
from fastclip.triton_kernels.tile import CONSTANTS, GAIN, INF, OFFSET2, REPAIR, SCALE, softplus

__all__ = [
    "ALIGNED",
    "HEADER",
    "DIAGONAL_SHARE",
    "PLANES",
    "plain_loss_kernel",
    "plain_norms_kernel",
    "plain_reduce_kernel",
    "plane_of",
]

DIAGONAL_SHARE = tl.constexpr(CONSTANTS)  # index of one more constant: the diagonal pairs' part of d_scale, times gain
HEADER = 16  # words reserved for the constants before the vectors: 64 bytes, which keeps the vectors aligned
PLANES = 7
COL = tl.constexpr(PLANES)  # first plane of the texts
# The distance between planes is a multiple of this many words (128 bytes, a cache line of a GPU). Every plane thus
# begins at a multiple of 64 bytes, because 64 bytes of header come first. The compiled kernels assume multiples of 16.
ALIGNED = tl.constexpr(32)


@triton.jit
def plane_of(N):
    """Number of words between two planes, rounded up so that every plane is aligned."""
    return (tl.cdiv(N, ALIGNED) * ALIGNED).to(tl.int64)


@triton.jit(do_not_specialize=["N"])
def plain_norms_kernel(
    image,  # a `Matrix` (N, D)
    text,  # (N, D)
    scale_ptr,
    constants_ptr,
    vec_ptr,  # (2 PLANES, plane) fp32: FACTOR, OUT and PROJECT are written
    cos_ptr,  # (N,) fp64
    top_ptr,  # (2 programs,) fp32; not written with NORMALIZE
    ticket_ptr,  # (2,) int32: tickets of the two reductions, which count finished programs; set to 0
    N,
    D,
    NORMALIZE: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Factors of all rows, and the cosines of the pairs.

    Math      r_k = 1 / max(|image_k|, 1e-12) with NORMALIZE, else 1, and c_k in the same way for text_k
              cos_k = r_k c_k <image_k, text_k>
              FACTOR_k = r_k, or r_k / 2^e with COPY, for rows that are copied times OUT_k = 2^e
    Program   BLOCK pairs, program 0 also writes the constants if NORMALIZE
    Traffic   reads every row once
    Precision fp64
    Ragged    rows beyond the last and the D tail load as 0
    Order     one program computes a whole pair: bitwise repeatable
    """
    block = tl.program_id(0)
    k = block * BLOCK + tl.arange(0, BLOCK)
    in_rows = k < N
    xx, yy, xy = pair_sums(image, text, k, k, in_rows, in_rows, D, True, BLOCK, BLOCK_D)
    row_inv, col_inv = inverse_norm(xx, NORMALIZE), inverse_norm(yy, NORMALIZE)
    tl.store(cos_ptr + k, row_inv.to(tl.float64) * col_inv.to(tl.float64) * xy, mask=in_rows)
    plane = plane_of(N)
    store_side(vec_ptr + k, plane, row_inv, in_rows, NORMALIZE, COPY)
    store_side(vec_ptr + COL * plane + k, plane, col_inv, in_rows, NORMALIZE, COPY)
    if NORMALIZE:
        scale = tl.load(scale_ptr).to(tl.float32)
        set_constants(constants_ptr, scale, bound_of(scale, top_ptr, 0, 0, NORMALIZE, BLOCK), block == 0)
    else:
        tl.store(top_ptr + block, tl.max(unit_norm(xx, row_inv), 0))
        tl.store(top_ptr + tl.num_programs(0) + block, tl.max(unit_norm(yy, col_inv), 0))
    if block == 0:
        tl.store(constants_ptr + REPAIR, 0.0)
        tl.store(ticket_ptr + tl.arange(0, 2), 0)


@triton.jit
def _weigh_pairs(
    row_lse, col_lse, cos_ptr, vec_ptr, plane, share_ptr, constants_ptr, weight, k, in_rows, N
):  # fmt: skip
    """Store the vectors of pairs k and the program's partial sums of the loss and of d_scale.

    The vectors are multiplied by a gain from the largest derivative among these pairs only, because the largest of all
    is not known before every program is done. `_finish_loss` brings them to one common gain.
    """
    cos = tl.load(cos_ptr + k, mask=in_rows, other=0.0)
    pos = tl.load(constants_ptr + SCALE).to(tl.float64) * cos
    row_loss, row_d = softplus(row_lse - pos)
    col_loss, col_d = softplus(col_lse - pos)
    weight += tl.zeros_like(cos)  # converts to fp64, also in the interpreter, where `weight` is a Python number
    row_weight, col_weight = weight / N, (1.0 - weight) / N
    row_d, col_d = row_weight * row_d, col_weight * col_d
    diagonal = -(row_d + col_d)
    gain = gain_of(tl.max(tl.maximum(largest_finite(row_d, in_rows), largest_finite(col_d, in_rows)), 0))
    block, blocks = tl.program_id(0), tl.num_programs(0)
    tl.store(share_ptr + block, tl.sum(tl.where(in_rows, row_weight * row_loss + col_weight * col_loss, 0.0), 0))
    tl.store(share_ptr + blocks + block, tl.sum(tl.where(in_rows, diagonal * cos, 0.0), 0))
    tl.store(share_ptr + 2 * blocks + block, gain)
    offset2 = tl.load(constants_ptr + OFFSET2)
    vec_ptrs = vec_ptr + k
    diagonal = (diagonal * gain).to(tl.float32)
    for side in tl.static_range(2):
        tl.store(vec_ptrs + DIAGONAL * plane, diagonal, mask=in_rows)
        lse, d = (row_lse, row_d) if side == 0 else (col_lse, col_d)
        guarded_weights(lse, d * gain, offset2, lowest_safe(offset2), constants_ptr, vec_ptrs, plane, in_rows, NEG)
        vec_ptrs += COL * plane


@triton.jit
def _finish_loss(
    vec_ptr, share_ptr, blocks, constants_ptr, loss_ptr, N, BLOCK: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Store the loss, the diagonal pairs' part of d_scale and the common gain, from the (3, blocks) partial sums.

    One program runs this after all `blocks` have stored. It adds in index order, so any program gives the same bits.
    """
    b = tl.arange(0, BLOCK)
    loss, diagonal = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    smallest, largest = tl.full((BLOCK,), float("inf"), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for b0 in range(0, blocks, BLOCK):
        inside = b0 + b < blocks
        loss += tl.load(share_ptr + b0 + b, mask=inside, other=0.0)
        diagonal += tl.load(share_ptr + blocks + b0 + b, mask=inside, other=0.0)
        gain = tl.load(share_ptr + 2 * blocks + b0 + b, mask=inside, other=float("inf"))
        smallest, largest = tl.minimum(smallest, gain), tl.maximum(largest, tl.where(inside, gain, 0.0))
    gain = tl.min(smallest, 0)
    tl.store(loss_ptr, tl.sum(loss, 0).to(tl.float32))
    tl.store(constants_ptr + DIAGONAL_SHARE, (tl.sum(diagonal, 0) * gain).to(tl.float32))
    tl.store(constants_ptr + GAIN, gain.to(tl.float32))
    # Bring all vectors to the smallest gain, with which no weight overflows. Gains are powers of two: no digit changes.
    if tl.max(largest, 0) != gain:
        plane = plane_of(N)
        for k0 in range(0, N, WIDE):
            k = k0 + tl.arange(0, WIDE)
            ratio = (gain / tl.load(share_ptr + 2 * blocks + k // BLOCK, mask=k < N, other=1.0)).to(tl.float32)
            change = (k < N) & (ratio != 1.0)
            for side in tl.static_range(2):
                for number in tl.static_range(3):
                    changed = DIAGONAL if number == 0 else (NEG if number == 1 else NEG_EXACT)
                    ptrs = vec_ptr + (side * COL + changed) * plane + k
                    tl.store(ptrs, tl.load(ptrs, mask=change, other=0.0) * ratio, mask=change)


@triton.jit(do_not_specialize=["tiles_m", "tiles_n", "N", "weight"])
def plain_reduce_kernel(
    row_part_ptr,  # (tiles_n, N) fp32, fp64 if EXACT; read with PARTS
    col_part_ptr,  # (tiles_m, N)
    lse_ptr,  # (2, plane) fp64; read without PARTS, when several panels were reduced before
    cos_ptr,  # (N,) fp64
    vec_ptr,  # (2 PLANES, plane)
    share_ptr,  # (3, programs) fp64
    ticket_ptr,  # () int32: atomic counter of the programs that are done, 0 at the start; used with TICKET
    constants_ptr,
    loss_ptr,  # () fp32; written with TICKET
    tiles_m,
    tiles_n,
    N,
    weight,  # w, the weight of the images' mean loss
    PARTS: tl.constexpr,
    EXACT: tl.constexpr,
    TICKET: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Loss, and vectors of the backward for an upstream gradient of 1, from the partial sums. Sets REPAIR if needed.

    Math      row_t = row_lse_k - s cos_k and col_t = col_lse_k - s cos_k
              loss = w mean_k softplus(row_t) + (1 - w) mean_k softplus(col_t)
              d_row = w sigmoid(row_t) / N and d_col = (1 - w) sigmoid(col_t) / N
    Program   BLOCK pairs, an EXACT launch returns at once unless a repair was requested
    Traffic   reads every partial sum once, twice if EXACT, and writes the vectors
    Precision fp64, vectors rounded to fp32 once, times a power of two that keeps weights from flushing
    Ragged    rows beyond N are not read
    Order     tiles from first to last within a program
              programs in index order, by the program that draws the last ticket or by `plain_loss_kernel`
    """
    wanted = True
    if EXACT:
        wanted = tl.load(constants_ptr + REPAIR) != 0
    if wanted:
        k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        in_rows, plane = k < N, plane_of(N)
        if PARTS:
            before = tl.full((BLOCK,), -INF if EXACT else 0.0, tl.float64)
            alone = tl.where(N == 1, 0, -1)
            row_lse = reduce_plane(
                row_part_ptr, before, constants_ptr, tiles_n, N, k, alone, 1, 1, False, EXACT, False, False,
                BLOCK, TILES,
            )  # fmt: skip
            col_lse = reduce_plane(
                col_part_ptr, before, constants_ptr, tiles_m, N, k, alone, 1, 1, False, EXACT, False, False,
                BLOCK, TILES,
            )  # fmt: skip
        else:
            row_lse = tl.load(lse_ptr + k, mask=in_rows, other=0.0)
            col_lse = tl.load(lse_ptr + plane + k, mask=in_rows, other=0.0)
        _weigh_pairs(row_lse, col_lse, cos_ptr, vec_ptr, plane, share_ptr, constants_ptr, weight, k, in_rows, N)
        if TICKET:
            # The barrier puts all threads' stores before the ticket. The ticket releases them, and the program that
            # draws the last ticket acquires the stores of all others. `plain_norms_kernel` has set the ticket to 0
            # earlier in the same stream, and it is an integer: which program draws the last one changes no result.
            # On NVIDIA, Triton's barrier orders global memory (bar.sync, atom.acq_rel). On AMD it does not wait for the
            # stores of other waves (seen in gfx942's code), so there `plain_loss_kernel` adds up in a separate launch.
            tl.debug_barrier()
            if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
                _finish_loss(vec_ptr, share_ptr, tl.num_programs(0), constants_ptr, loss_ptr, N, BLOCK, WIDE)


@triton.jit(do_not_specialize=["blocks", "N"])
def plain_loss_kernel(
    vec_ptr,  # (2 PLANES, plane)
    share_ptr,  # (3, blocks) fp64
    constants_ptr,
    loss_ptr,  # () fp32
    blocks,
    N,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Loss and common gain from the partial sums of `plain_reduce_kernel`, in fp64. One program, used on AMD."""
    _finish_loss(vec_ptr, share_ptr, blocks, constants_ptr, loss_ptr, N, BLOCK, WIDE)
