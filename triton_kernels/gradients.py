"""From weights to gradients: blocks of stored weights, the library's products with the features, and the finish.

The vectors of one side, fp32 (planes, size), are what the tile kernels and the finish need of each row; labels lie
among them as int32 bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from fastclip.triton_kernels.features import EPS, Features
from fastclip.triton_kernels.launch import Config, addmm, cdiv, chunks, launch, processors, workspace_bytes
from fastclip.triton_kernels.tile import SCALE
from torch import Tensor

__all__ = ["ALIGNMENT", "OWN", "FACTOR", "Gradients", "store_factors"]

# Planes: what a dot product is multiplied with; of the own pair the weight; of the result the factor, and whether it
# is projected (1, or 0 where the norm is a constant)
FACTOR, OWN, OUT, PROJECT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)

ALIGNMENT = 128  # every tile divides it: a block of weights padded to it is written without masks
_LONGEST_SUM = 65536  # terms in one chain of additions: tensor cores truncate
_ROWS, _COLUMNS = 4, 256  # of a program of the finish, at a time


@triton.jit
def store_factors(vec_ptrs, plane, inv_ptrs, factor_ptrs, constants_ptr, gain, some, NORMALIZE: tl.constexpr):
    """FACTOR, OUT and PROJECT of some rows, from their inverse norms and factors; gain is undone by OUT."""
    inv = tl.load(inv_ptrs, mask=some, other=0.0)
    factor = tl.load(factor_ptrs, mask=some, other=1.0)
    tl.store(vec_ptrs + FACTOR * plane, factor, mask=some)
    out = tl.load(constants_ptr + SCALE).to(tl.float64) * (inv.to(tl.float64) / factor.to(tl.float64)) / gain
    tl.store(vec_ptrs + OUT * plane, out.to(tl.float32), mask=some)
    project = tl.zeros_like(factor)
    if NORMALIZE:  # where the norm was clamped it is a constant
        project = tl.where(inv * EPS < 1.0, 1.0, project)
    tl.store(vec_ptrs + PROJECT * plane, project, mask=some)


@triton.jit(do_not_specialize=["vec_plane", "other_plane", "size", "other_size", "offset"])
def finish_kernel(
    raw_ptr,  # (size, raw_row_stride) fp32: sum_j G_kj r_k c_j other_j
    x_ptr,  # (size, D)
    other_ptr,  # (other_size, D)
    raw_row_stride,
    x_row_stride,
    other_row_stride,
    vec_ptr,  # (planes, vec_plane): FACTOR, OWN, OUT, PROJECT
    other_vec_ptr,  # (planes, other_plane): FACTOR
    vec_plane,
    other_plane,
    out_ptr,  # (size, D); not written without WRITE
    part_ptr,  # (programs,): their share of d_scale; not written without SCALE_GRADIENT
    size,
    other_size,
    D,
    offset,
    gain,
    HAS_OWN: tl.constexpr,
    WRITE: tl.constexpr,
    SCALE_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds the own pairs to the sums of the others, projects, scales and casts.

    Math      g = raw + own_k r_k c_j other_j, j = k + offset;  out = s (g - u <u, g>) r_k / (what raw has of it)
    Program   BLOCK rows, twice over D
    Traffic   reads raw, x, other twice, writes out
    Precision fp32; the own pair's weight, the largest of a row, was never rounded to the features' dtype
    Ragged    rows beyond the last and the D tail load as 0
    Order     one program a row: bitwise repeatable
    """
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    some = k < size
    own = k + offset
    has = some & (own >= 0) & (own < other_size)
    own = tl.where(has, own, 0)
    weight = tl.zeros((BLOCK,), tl.float32)
    if HAS_OWN:
        weight = tl.load(vec_ptr + FACTOR * vec_plane + k, mask=some, other=0.0)
        weight *= tl.load(vec_ptr + OWN * vec_plane + k, mask=some, other=0.0)
        weight *= tl.load(other_vec_ptr + FACTOR * other_plane + own, mask=has, other=0.0)
    raw_ptrs = raw_ptr + k.to(tl.int64)[:, None] * raw_row_stride
    x_ptrs = x_ptr + k.to(tl.int64)[:, None] * x_row_stride
    other_ptrs = other_ptr + own.to(tl.int64)[:, None] * other_row_stride
    along, dot, squares = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)[None, :]
        x = tl.load(x_ptrs + d, mask=some[:, None] & (d < D), other=0.0).to(tl.float32)
        g = tl.zeros_like(x)
        if WRITE:
            g = tl.load(raw_ptrs + d, mask=some[:, None] & (d < D), other=0.0)
        if HAS_OWN:
            y = tl.load(other_ptrs + d, mask=has[:, None] & (d < D), other=0.0).to(tl.float32)
            dot += tl.sum(x * y, 1)
            g += weight[:, None] * y
        along += tl.sum(x * g, 1)
        squares += tl.sum(x * x, 1)
    if SCALE_GRADIENT:
        tl.store(part_ptr + tl.program_id(0), tl.sum(weight * dot, 0))
    if WRITE:
        # <u, g> u from these very rows: the rounded inverse norm would leave more of g along u
        project = tl.load(vec_ptr + PROJECT * vec_plane + k, mask=some, other=0.0)
        along = tl.where(project != 0, along / tl.where(project != 0, squares, 1.0), 0.0)
        factor = gain * tl.load(vec_ptr + OUT * vec_plane + k, mask=some, other=0.0)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)[None, :]
            x = tl.load(x_ptrs + d, mask=some[:, None] & (d < D), other=0.0).to(tl.float32)
            g = tl.load(raw_ptrs + d, mask=some[:, None] & (d < D), other=0.0)
            if HAS_OWN:
                g += weight[:, None] * tl.load(other_ptrs + d, mask=has[:, None] & (d < D), other=0.0).to(tl.float32)
            g = factor[:, None] * (g - along[:, None] * x)
            out_ptrs = out_ptr + k.to(tl.int64)[:, None] * D + d
            tl.store(out_ptrs, g.to(out_ptr.dtype.element_ty), mask=some[:, None] & (d < D))


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class Gradients:
    """A problem cut into blocks of weights that fit into the workspace."""

    def __init__(self, image: Features, text: Features, D: int) -> None:
        self.image, self.text, self.D = image, text, D
        x = image.x
        self.M, self.N = len(image.x), len(text.x)
        weights = workspace_bytes() // x.element_size()
        self.block_n = min(_padded(self.N), _LONGEST_SUM, max(weights // ALIGNMENT // ALIGNMENT, 1) * ALIGNMENT)
        # The product with the texts fills whole waves of processors with its tiles of 128 x 256
        wave = max(processors(x.device) // -(-D // 256), 1) * ALIGNMENT
        rows = min(weights // self.block_n, _LONGEST_SUM)
        rows = rows // wave * wave or rows // ALIGNMENT * ALIGNMENT
        self.block_m = min(_padded(self.M), max(rows, ALIGNMENT))

    @staticmethod
    def tiles(rows: int, columns: int, *kinds: Config) -> int:
        """Tiles of a block, of the kind that has most of them; a multiple of 4, so that every block's start aligned."""
        return max(-(-rows // kind.BLOCK_M) * -(-columns // kind.BLOCK_N) + 3 & ~3 for kind in kinds)

    def count_tiles(self, *kinds: Config) -> int:
        rows, columns = chunks(self.M, self.block_m), chunks(self.N, self.block_n)
        return sum(self.tiles(i1 - i0, j1 - j0, *kinds) for i0, i1 in rows for j0, j1 in columns)

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of the largest block."""
        return min(self.block_m, self.M), min(self.block_n, self.N)

    @property
    def finish_parts(self) -> int:
        return -(-self.M // _ROWS)

    def compute(
        self,
        weigh: Callable[[int, int, int, int, Tensor], None],
        row_vec: Tensor,
        col_vec: Tensor,
        offset: int | None,
        scale_part: Tensor,
        d_image: Tensor | None,
        d_text: Tensor | None,
        factor: float = 1.0,
        stored: bool = True,
    ) -> None:
        """d_image (M, D), d_text (N, D), times `factor`, from the weights r_i G_ij c_j that ``weigh(i0, i1, j0, j1,
        weights)`` stores.

        offset: of the own pairs, whose weights are in the vectors and not among the stored; None when there are none.
        scale_part (finish_parts,): the own pairs' share of d_scale. stored: `weigh` does store weights.
        """
        x = self.image.x
        weights = x.new_empty((self.block_m, self.block_n) if stored else (ALIGNMENT, ALIGNMENT))
        raw_text = None if d_text is None else x.new_empty(self.N, x.shape[1], dtype=torch.float32)
        raw_image = x.new_empty(0 if d_image is None else self.block_m, x.shape[1], dtype=torch.float32)
        for i0, i1 in chunks(self.M, self.block_m):
            for j0, j1 in chunks(self.N, self.block_n):
                weigh(i0, i1, j0, j1, weights)
                block = weights[: i1 - i0, : j1 - j0]
                if d_image is not None:
                    addmm(raw_image[: i1 - i0], block, self.text.x[j0:j1], keep=j0 > 0)
                if raw_text is not None:
                    addmm(raw_text[j0:j1], block.T, x[i0:i1], keep=i0 > 0)
            if d_image is not None or offset is not None:
                self._finish(raw_image, True, row_vec, col_vec, i0, i1, offset, scale_part, d_image, factor)
        if raw_text is not None:
            self._finish(raw_text, False, col_vec, row_vec, 0, self.N, offset, None, d_text, factor)

    def _finish(
        self,
        raw: Tensor,
        images: bool,
        vec: Tensor,
        other_vec: Tensor,
        k0: int,
        k1: int,
        offset: int | None,
        part: Tensor | None,
        out: Tensor | None,
        factor: float,
    ) -> None:
        x, other = (self.image.x, self.text.x) if images else (self.text.x, self.image.x)
        shift = 0 if offset is None else k0 + (offset if images else -offset)
        launch(
            finish_kernel,
            cdiv(k1 - k0, _ROWS),
            *(raw, x[k0:k1], other, raw.stride(0), x.stride(0), other.stride(0)),
            *(vec[:, k0:], other_vec, vec.stride(0), other_vec.stride(0)),
            *(raw if out is None else out[k0:k1], raw if part is None else part[k0 // _ROWS :]),
            *(k1 - k0, len(other), self.D, shift, factor),
            HAS_OWN=offset is not None,
            WRITE=out is not None,
            SCALE_GRADIENT=part is not None,
            BLOCK=_ROWS,
            BLOCK_D=_COLUMNS,
        )
