"""Blocks of logits: torch.mm fills one reused buffer, and a native pass works on it in place.

FASTCLIP_WORKSPACE_MB bounds the size of a block, so that no larger matrix is stored. Features in fp32 are read
in place. 16-bit features are converted to fp32 block by block.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastclip._backends.cpu import native
from fastclip.system import env

__all__ = [
    "BLOCK_M",
    "Dots",
    "Features",
    "Plan",
    "add_product",
    "cuts",
    "empty",
    "factors",
    "features_of",
    "inv_norms",
    "native_block",
    "normalized",
    "threads",
    "workspace",
]

BLOCK_M = 4096  # rows of a block if the workspace allows: products of few rows are slow
_NORM_ROWS = 256  # rows of 16-bit features that are converted at a time for their norms
_LARGE_NORM = 2.0**40  # above it, the fp32 product of two unnormalised rows could overflow
_FEW_LOGITS = 2**16  # below it, a second thread costs more than it saves


def cuts(size: int, block: int) -> list[tuple[int, int]]:
    if size <= block:
        return [(0, size)] if size else []
    return [(start, min(start + block, size)) for start in range(0, size, block)]


def threads(M: int, N: int) -> int:
    """Return the number of threads for a pass of the native code over M x N logits."""
    return 1 if M * N < _FEW_LOGITS else torch.get_num_threads()


Block = tuple[int, int, int, int]  # rows i0 to i1 and columns j0 to j1 of the logits
# A block in the form that the native code takes: address and row stride of the dot products, then M, N, i0, j0
Dots = tuple[int, int, int, int, int, int]


class Features:
    """The rows (M, D) of one side, which the matrix products read in fp32.

    The products read rows that are not normalised, and are multiplied by the inverse norms afterwards. Only large rows,
    whose norm exceeds `_LARGE_NORM`, are multiplied by their inverse norms before the products, which would otherwise
    overflow.

    inv_norm: address of the factors of the products, fp32 (M,): the inverse norms, or 1 for large rows. It is 0 for
    features that are not normalised. It is an address because slicing a tensor takes a microsecond, and with few rows
    such microseconds dominate the run time.
    outer: the factors of the rows, fp32 (M,): the inverse norms of large rows, or 1 for all other rows. It is None if
    no row is large.
    """

    def __init__(self, x: Tensor, inv_norm: int = 0, outer: Tensor | None = None) -> None:
        if outer is not None:
            x = (x.double() * outer.double()[:, None]).float()
        self.row_stride, column_stride = x.stride()
        if column_stride != 1:
            x = x.contiguous()
            self.row_stride = x.stride(0)
        self.x, (self.M, self.D) = x, x.shape
        self.inv_norm, self.outer = inv_norm, outer
        self.fp32 = x.dtype == torch.float32
        if not self.fp32:
            self.row_stride = self.D
            self.block: Tensor | None = None
            self.in_block: tuple[int, int] | None = None

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows in fp32. 16-bit features share one buffer: use the rows before the next call."""
        if self.fp32:
            return self.x if stop - start == self.M else self.x[start:stop]
        if self.block is None or self.block.shape[0] < stop - start:
            self.block, self.in_block = torch.empty(stop - start, self.D, dtype=torch.float32, device="cpu"), None
        rows = self.block[: stop - start]
        if self.in_block != (start, stop):
            rows.copy_(self.x[start:stop])
            self.in_block = (start, stop)
        return rows

    def norms(self, inv_norm: int, outer: int, workers: int) -> bool:
        """Write the inv_norm and outer of all rows to these addresses. Return True if a row is large.

        If `outer` is 0, only inverse norms are written, and no row is treated as large.
        """
        if self.fp32:
            x = self.x.data_ptr()
            return bool(native.module.norms(x, self.row_stride, self.M, self.D, inv_norm, outer, workers))
        large = 0
        for start, stop in cuts(self.M, _NORM_ROWS):
            out = inv_norm + 4 * start, outer and outer + 4 * start
            x = self.rows(start, stop).data_ptr()
            large += native.module.norms(x, self.row_stride, stop - start, self.D, *out, workers)
        return large > 0

    def finish(self, raw: Tensor, rows: Tensor, start: int, factor: float, workers: int) -> None:
        """Replace raw by factor (raw - u <u, raw>), with u the unit rows of `rows`, which begin at row `start`.

        raw is (M, D), fp32 and contiguous.
        """
        matrices = raw.data_ptr(), self.D, rows.data_ptr(), self.row_stride
        inv_norm = self.inv_norm and self.inv_norm + 4 * start
        outer = 0 if self.outer is None else self.outer.data_ptr() + 4 * start
        native.module.finish(*matrices, raw.shape[0], self.D, inv_norm, outer, factor, workers)

    def finish_all(self, raw: Tensor, out: Tensor, factor: float, workers: int) -> None:
        """Write the results of `finish` for all rows to `out` (M, D), which may be `raw`. raw is overwritten."""
        for start in range(0, self.M, BLOCK_M):
            stop = start + BLOCK_M if start + BLOCK_M < self.M else self.M
            rows = raw[start:stop]
            self.finish(rows, self.rows(start, stop), start, factor, workers)
            if raw is not out:
                out[start:stop].copy_(rows)


def normalized(x: Tensor, norms: Tensor, start: int, workers: int) -> Features:
    """Return `Features` of x (M, D). inv_norm and outer, M numbers each, are written to `norms` (fp32) from `start`."""
    features = Features(x)
    M = features.M
    at = norms.data_ptr() + 4 * start
    if features.norms(at, at + 4 * M, workers):
        return Features(x, at, norms[start + M : start + 2 * M])
    features.inv_norm = at
    return features


def inv_norms(x: Tensor, normalize: bool) -> Tensor:
    """Return inverse norms, as `reference.inv_norms` does."""
    out = torch.ones(x.shape[0], dtype=torch.float32, device="cpu")
    if normalize:
        Features(x).norms(out.data_ptr(), 0, threads(*x.shape))
    return out


def features_of(x: Tensor, inv_norm: Tensor, normalize: bool) -> tuple[Features, Tensor]:
    """Return `Features` of rows with these `inv_norms`, and the factors of their dot products, fp32 (M,).

    `Features` holds an address of the factors: the caller must keep them alive.
    """
    inv_norm = inv_norm.float().contiguous()
    if not normalize:
        return Features(x), inv_norm
    large = inv_norm * _LARGE_NORM < 1
    if not large.any():
        return Features(x, inv_norm.data_ptr()), inv_norm
    outer, inv_norm = torch.where(large, inv_norm, 1.0), torch.where(large, 1.0, inv_norm)
    return Features(x, inv_norm.data_ptr(), outer), inv_norm


class _Workspace(threading.local):
    """The buffer of logits of this thread, kept between calls.

    Fresh memory pages cost more than a pass over them (8 ms for 32 MiB). The last block of a forward pass also stays in
    the buffer, so that the backward pass need not compute its product again.
    """

    buffer: Tensor | None = None
    size = 0  # size of the buffer, in floats
    # The forward pass whose dot products the buffer holds, and their block. A tensor that the forward pass created
    # identifies it: while this reference lives, no other tensor can have its address.
    owner: Tensor | None = None
    block: Block | None = None

    def reserve(self, size: int, allowed: int) -> Tensor:
        """Return a buffer of at least `size` floats.

        The buffer of an earlier call is reused if it has at least `size` and at most `allowed` floats.
        """
        if self.buffer is None or not size <= self.size <= allowed:
            self.forget()
            self.buffer = None  # freed before the new one is allocated
            with torch.inference_mode(False):  # inference tensors are unusable outside that mode
                self.buffer, self.size = torch.empty(size, dtype=torch.float32, device="cpu"), size
        return self.buffer

    def keep(self, owner: Tensor, block: Block) -> None:
        self.owner, self.block = owner, block

    def forget(self) -> None:
        self.owner = self.block = None

    def holds(self, owner: Tensor, block: Block) -> bool:
        return self.owner is not None and self.block == block and self.owner.data_ptr() == owner.data_ptr()


workspace = _Workspace()


class Plan:
    """Blocks of a problem that fit into the workspace. The matrix product of each is written to one buffer.

    owner: in a backward pass, the tensor that identifies its forward pass. others: further features of the same images
    and texts, whose dot products `beside` writes to a second block of the workspace.
    """

    def __init__(
        self,
        image: Features,
        text: Features,
        owner: Tensor | None = None,
        others: Sequence[tuple[Features, Features]] = (),
    ) -> None:
        self.image, self.text, self.owner, self.others = image, text, owner, others
        self.workers = threads(image.M, text.M)
        M, N = image.M, text.M
        whole = 0, M, 0, N
        self.ready = owner is not None and workspace.buffer is not None and workspace.holds(owner, whole)
        if self.ready and workspace.buffer is not None:  # it still holds the only block of the forward pass
            self.block_m, self.buffer, self.blocks = M, workspace.buffer, [whole]
            return
        allowed = floats = env.workspace_bytes() // 4
        parts = 2 if others else 1
        floats //= parts
        # For 16-bit features the workspace also holds fp32 copies: d_text, the rows of the block and their d_image
        copied = 0 if image.fp32 else image.D
        for x, _ in others:
            copied += 0 if x.fp32 else x.D
        floats -= min(N * copied, floats // 2) if copied else 0
        self.block_m, block_n = M, N
        if M > BLOCK_M or floats < 256 * M:
            self.block_m = min(M, BLOCK_M, max(floats // 256, 64))
        if 2 * self.block_m * copied + N * (self.block_m + copied) > floats:
            block_n = min(N, max((floats - 2 * self.block_m * copied) // (self.block_m + copied), 64))
        self.buffer = workspace.reserve(parts * self.block_m * block_n, allowed)
        if (self.block_m, block_n) == (M, N):
            self.blocks = [whole]
        else:
            self.blocks = [(*rows, *columns) for rows in cuts(M, self.block_m) for columns in cuts(N, block_n)]

    def dots(self, block: Block) -> tuple[Tensor, Dots]:
        """Return the dot products <image_i, text_j> of a block, which the caller may overwrite.

        They are computed unless the buffer still holds them from the forward pass.
        """
        i0, i1, j0, j1 = block
        dot = self.buffer[: (i1 - i0) * (j1 - j0)].view(i1 - i0, j1 - j0)
        if not (self.ready or (self.owner is not None and workspace.holds(self.owner, block))):
            torch.mm(self.image.rows(i0, i1), self.text.rows(j0, j1).T, out=dot)
        workspace.forget()
        return dot, (dot.data_ptr(), j1 - j0, i1 - i0, j1 - j0, i0, j0)

    def beside(self, k: int, dots: Dots) -> tuple[Tensor, Dots]:
        """Return the dot products of the features others[k] in a block of which `dots` holds those of the features."""
        _, _, M, N, i0, j0 = dots
        image, text = self.others[k]
        dot = self.buffer[M * N : 2 * M * N].view(M, N)
        torch.mm(image.rows(i0, i0 + M), text.rows(j0, j0 + N).T, out=dot)
        return dot, (dot.data_ptr(), *dots[1:])

    def backward(self, factor: float, d_image: Tensor | None, d_text: Tensor | None) -> Iterator[Dots]:
        """Compute the gradients of the features from weights r_i G_ij c_j, which the caller supplies for each block.

        G_ij is the derivative of the loss with respect to the logit z_ij, and r and c are the inverse norms. The
        iterator yields the dot products of each block, and the caller overwrites them with the weights before it
        continues. At the end d_image (M, D) and d_text (N, D), contiguous, hold `factor` times the products of weights
        and features, projected if the features are normalised. Pass None for a gradient that is not needed.
        """
        image, text = self.image, self.text
        # fp32 gradients are accumulated in the output
        raw_text = d_text if d_text is None or d_text.dtype == torch.float32 else empty(text.M, text.D)
        raw_rows = None if d_image is None or d_image.dtype == torch.float32 else empty(self.block_m, image.D)
        # In the reverse order of the forward pass, whose last block may still be in the workspace
        for block in reversed(self.blocks):
            i0, i1, j0, j1 = block
            images, texts = image.rows(i0, i1), text.rows(j0, j1)
            weights, dots = self.dots(block)
            yield dots
            if d_image is not None:
                raw = d_image[i0:i1] if raw_rows is None else raw_rows[: i1 - i0]
                add_product(raw, weights, texts, keep=j1 < text.M)
                if j0 == 0:
                    image.finish(raw, images, i0, factor, self.workers)
                    if raw_rows is not None:
                        d_image[i0:i1].copy_(raw)
            if raw_text is not None:
                add_product(raw_text[j0:j1], weights.T, images, keep=i1 < image.M)
        if d_text is not None and raw_text is not None:
            text.finish_all(raw_text, d_text, factor, self.workers)


def empty(rows: int, columns: int) -> Tensor:
    return torch.empty(rows, columns, dtype=torch.float32, device="cpu")


def add_product(out: Tensor, a: Tensor, b: Tensor, keep: bool) -> None:
    """Write the product a b to `out`, or add it if `keep`."""
    if b.shape[1] == 1:
        # MKL's matrix-vector product adds thousands of terms one by one, and loses digits. Its matrix product does not.
        product = torch.mm(a, b.expand(-1, 2), out=out.new_empty(out.shape[0], 2))[:, :1]
        torch.add(out, product, out=out) if keep else out.copy_(product)
    elif keep:
        torch.addmm(out, a, b, out=out)
    else:
        torch.mm(a, b, out=out)


def native_block(dots: Dots, offset: int, exclude_self: bool = False, other: int = 0) -> Any:
    """Return a block for the native code. other: address of dot products of other features (`Plan.beside`), or 0."""
    place = dict(zip(("dot", "row_stride", "M", "N", "i0", "j0"), dots))
    return native.module.Block(**place, offset=offset, exclude_self=exclude_self, other=other)


def factors(inv_norm: Tensor, text_inv_norm: Tensor, scale: float) -> tuple[dict[str, Tensor | None], ...]:
    """Return the row factors (M,) and the column factors (N,) that turn dot products into logits.

    The row factors include the scale. Entry "factor_low" of the result holds their rounding error, in fp32. Without
    this entry, rounding of the scale would shift logits of 1,000 by 3e-5, all in the same direction.
    """
    exact = inv_norm.double() * scale
    high = exact.float()
    low = torch.where(high.isfinite(), exact - high, 0.0).float()
    return {"factor": high, "factor_low": low}, {"factor": text_inv_norm, "factor_low": None}
