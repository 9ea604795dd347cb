"""A problem cut into blocks of logits: torch.mm fills one reused buffer, a native pass works on it in place.

The block is bounded by FASTCLIP_WORKSPACE_MB; nothing M x N exists. Features in fp32 are used where they lie, 16-bit
ones become fp32 block by block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip import _env
from fastclip._backends.cpu import native
from fastclip._backends.problem import Problem
from fastclip._backends.reference import EPS
from fastclip._backends.reference import inv_norms as exact_inv_norms

__all__ = ["Block", "Plan", "factors", "inv_norms", "native_block", "workspace"]

_BLOCK_M = 4096  # rows of a block, where the workspace allows: short products are slow
_LARGE_NORM = 2.0**40  # norms beyond it could overflow the fp32 product of two unnormalised rows


def _cuts(size: int, block: int) -> list[tuple[int, int]]:
    return [(start, min(start + block, size)) for start in range(0, size, block)]


def inv_norms(x: Tensor, normalize: bool) -> Tensor:
    """As `reference.inv_norms`, in fp32 where the squares allow it."""
    if normalize:
        norm = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
        if not norm.isinf().any():
            return norm.clamp_min(EPS).reciprocal()
    return exact_inv_norms(x, normalize)


class Block(NamedTuple):
    """Rows i0 to i1 and columns j0 to j1 of the logits."""

    i0: int
    i1: int
    j0: int
    j1: int


class Features:
    """One side's rows as the products see them: fp32, `inv_norm` still to be multiplied in."""

    def __init__(self, x: Tensor, inv_norm: Tensor, normalize: bool) -> None:
        self.inv_norm = inv_norm.float().contiguous()  # what the kernels multiply a dot product with
        self.outer = None  # what remains of 1 / norm when the products get unit rows
        if normalize and x.numel() and inv_norm.amin() * _LARGE_NORM < 1:
            x = (x.double() * inv_norm.double()[:, None]).float()
            self.outer, self.inv_norm = inv_norm, torch.ones_like(self.inv_norm)
        # Where the norm was clamped it is a constant, and the gradient is not projected.
        self.projection = torch.where(inv_norm * EPS < 1, self.inv_norm.square(), 0.0) if normalize else None
        self.x = x if 1 in x.stride() or x.numel() == 0 else x.contiguous()
        self.block: Tensor | None = None
        self.in_block: tuple[int, int] | None = None

    def rows(self, start: int, stop: int) -> Tensor:
        """fp32 rows, to be used before the next call with others: 16-bit ones share one buffer."""
        if self.x.dtype == torch.float32:
            return self.x[start:stop]
        if self.block is None or self.block.shape[0] < stop - start:
            self.block, self.in_block = torch.empty(stop - start, self.x.shape[1], dtype=torch.float32), None
        rows = self.block[: stop - start]
        if self.in_block != (start, stop):
            rows.copy_(self.x[start:stop])
            self.in_block = (start, stop)
        return rows

    def finish(self, raw: Tensor, start: int, stop: int, factor: float, out: Tensor) -> None:
        """out = factor (raw - u <u, raw>), u the unit rows; raw (stop - start, D) fp32 is overwritten."""
        if self.projection is not None:
            x = self.rows(start, stop)
            along = torch.linalg.vecdot(raw, x) * self.projection[start:stop]
            raw.addcmul_(x, along[:, None], value=-1)
        if self.outer is not None:
            raw.mul_(self.outer[start:stop, None])
        torch.mul(raw, factor, out=raw)
        if out.data_ptr() != raw.data_ptr():
            out.copy_(raw)


class _Workspace(threading.local):
    """This thread's buffer of logits, kept between calls: fresh pages cost more than a pass over them (8 ms for 32
    MiB), and the block that a forward pass leaves in it needs no second product in the backward pass that follows.
    """

    buffer: Tensor | None = None
    # Whose block of dot products the buffer holds, and which one. A forward pass is known by its inverse norms, which
    # it made itself: while this reference lives, no other tensor can be at their address.
    owner: Tensor | None = None
    block: Block | None = None

    def reserve(self, size: int) -> Tensor:
        if self.buffer is None or self.buffer.numel() < size or self.buffer.numel() * 4 > _env.workspace_bytes():
            self.forget()
            self.buffer = None  # freed before the new one is made
            self.buffer = torch.empty(size, dtype=torch.float32)
        return self.buffer

    def keep(self, owner: Tensor, block: Block) -> None:
        self.owner, self.block = owner, block

    def forget(self) -> None:
        self.owner = self.block = None

    def holds(self, owner: Tensor | None, block: Block) -> bool:
        if owner is None or self.owner is None:
            return False
        return self.owner.data_ptr() == owner.data_ptr() and self.block == block


workspace = _Workspace()


class Plan:
    """Cuts the problem into blocks of at most the workspace's size, the matrix product of each into one buffer."""

    def __init__(self, p: Problem, r: Tensor, c: Tensor) -> None:
        image, text = Features(p.image, r, p.normalize), Features(p.text, c, p.normalize)
        self.image, self.text = image, text
        self.M, self.N = image.x.shape[0], text.x.shape[0]
        floats = _env.workspace_bytes() // 4
        copied = 0 if image.x.dtype == torch.float32 else image.x.shape[1]
        # 16-bit features need fp32 room out of the same workspace: d_text, the block's rows and their d_image
        floats -= min(self.N * copied, floats // 2)
        self.block_m = min(self.M, _BLOCK_M, max(floats // 256, 64))
        self.block_n = min(self.N, max((floats - 2 * self.block_m * copied) // (self.block_m + copied), 64))
        self.buffer = workspace.reserve(self.block_m * self.block_n)

    def blocks(self) -> list[Block]:
        rows, columns = _cuts(self.M, self.block_m), _cuts(self.N, self.block_n)
        return [Block(i0, i1, j0, j1) for i0, i1 in rows for j0, j1 in columns]

    def dots(self, images: Tensor, texts: Tensor, block: Block, owner: Tensor | None = None) -> Tensor:
        """<I_i, T_j> of a block, computed unless the buffer still has it from the forward pass `owner`."""
        rows, columns = block.i1 - block.i0, block.j1 - block.j0
        dot = self.buffer[: rows * columns].view(rows, columns)
        if not workspace.holds(owner, block):
            workspace.forget()
            torch.mm(images, texts.T, out=dot)
        return dot

    def forward(self) -> Iterator[tuple[Block, Tensor]]:
        """Every block with its dot products."""
        for block in self.blocks():
            images, texts = self.image.rows(block.i0, block.i1), self.text.rows(block.j0, block.j1)
            yield block, self.dots(images, texts, block)

    def backward(
        self,
        weigh: Callable[[Block, Tensor], None],
        factor: float,
        d_image: Tensor | None,
        d_text: Tensor | None,
        owner: Tensor | None = None,
    ) -> None:
        """Gradients of the features from the weights r_i G_ij c_j, into which `weigh` turns a block's dot products.

        d_image (M, D), d_text (N, D): overwritten with factor times the sums of weights and features, projected where
        the features are normalised; None where they are not wanted.
        """
        D = self.image.x.shape[1]
        # fp32 gradients are accumulated where they are returned
        fp32 = torch.float32
        raw_text = d_text if d_text is None or d_text.dtype == fp32 else torch.empty(self.N, D, dtype=fp32)
        raw_rows = None if d_image is None or d_image.dtype == fp32 else torch.empty(self.block_m, D, dtype=fp32)
        # In the opposite order of the forward pass, whose last block may still be in the workspace
        for block in reversed(self.blocks()):
            i0, i1, j0, j1 = block
            images, texts = self.image.rows(i0, i1), self.text.rows(j0, j1)
            weights = self.dots(images, texts, block, owner)
            workspace.forget()
            weigh(block, weights)
            if d_image is not None:
                raw_image = d_image[i0:i1] if raw_rows is None else raw_rows[: i1 - i0]
                _add_product(raw_image, weights, texts, keep=j1 < self.N)
                if j0 == 0:
                    self.image.finish(raw_image, i0, i1, factor, d_image[i0:i1])
            if raw_text is not None:
                _add_product(raw_text[j0:j1], weights.T, images, keep=i1 < self.M)
        if d_text is not None and raw_text is not None:
            for j0, j1 in _cuts(self.N, _BLOCK_M):
                self.text.finish(raw_text[j0:j1], j0, j1, factor, d_text[j0:j1])


def _add_product(out: Tensor, a: Tensor, b: Tensor, keep: bool) -> None:
    """out = a b, added to what was there if `keep`."""
    if b.shape[1] == 1:
        # MKL's matrix-vector product adds thousands of terms one after the other; its matrix product does not
        product = torch.mm(a, b.expand(-1, 2))[:, :1]
        torch.add(out, product, out=out) if keep else out.copy_(product)
    else:
        torch.addmm(out, a, b, beta=int(keep), out=out)


def native_block(dot: Tensor, block: Block, offset: int, exclude_self: bool = False) -> Any:
    M, N = dot.shape
    return native.module.Block(
        dot=dot.data_ptr(),
        row_stride=dot.stride(0),
        M=M,
        N=N,
        i0=block.i0,
        j0=block.j0,
        offset=offset,
        exclude_self=exclude_self,
    )


def factors(image: Features, text: Features, scale: float) -> tuple[dict[str, Tensor | None], ...]:
    """z is a dot product times these: (M,) with the scale, and what rounding took from it; (N,).

    The scale rounded would shift logits of 1,000 by 3e-5, all in the same direction.
    """
    exact = image.inv_norm.double() * scale
    high = exact.float()
    low = torch.where(high.isfinite(), exact - high, 0.0).float()
    return {"factor": high, "factor_low": low}, {"factor": text.inv_norm, "factor_low": None}
