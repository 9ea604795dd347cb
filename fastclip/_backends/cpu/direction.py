"""The loss of one direction and its gradients in one pass over whole rows of logits, as in `reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastclip._backends.cpu import native
from fastclip._backends.cpu.blocks import (
    BLOCK_M,
    Features,
    add_product,
    cuts,
    empty,
    normalized,
    threads,
    workspace,
)
from fastclip._backends.native import address
from fastclip._backends.problem import Problem
from fastclip._backends.reference import saved_dtype
from fastclip.system import env

__all__ = ["direction_fits", "direction_fwd"]

_FEWEST = 64  # rows of a panel: products of fewer rows are slow
_COLUMNS = 1024  # 16-bit texts that are converted at a time


def _panel(image: Tensor, text: Tensor) -> tuple[int, int]:
    """Return how many whole rows of logits fit into the workspace, and how many texts a product takes.

    The workspace also holds the images of a panel times the factors of their rows. With 16-bit features it holds fp32
    copies, too: d_text, the texts of a product, and the images of a panel with their d_image.
    """
    (M, D), N, floats = image.shape, text.shape[0], env.workspace_bytes() // 4
    if image.dtype == torch.float32:
        return min(M, BLOCK_M, floats // (N + D)), N
    columns = min(N, _COLUMNS)
    floats -= min(N * D, floats // 2) + columns * D
    return min(M, BLOCK_M, floats // (N + 3 * D)), columns


def direction_fits(image: Tensor, text: Tensor) -> bool:
    """Return True unless there are so many texts that the workspace holds too few whole rows of logits."""
    rows, _ = _panel(image, text)
    return rows >= _FEWEST or rows >= image.shape[0]


class _Panels:
    """Panels of whole rows of logits, which share one buffer."""

    def __init__(self, image: Features, text: Features) -> None:
        self.image, self.text = image, text
        rows, columns = _panel(image.x, text.x)
        rows = min(max(rows, _FEWEST), image.M)
        self.columns, self.rows = cuts(text.M, columns), cuts(image.M, rows)
        self.size = rows
        size = rows * text.M
        self.buffer = workspace.reserve(size, max(env.workspace_bytes() // 4, size))
        workspace.forget()

    def dots(self, i0: int, i1: int) -> Tensor:
        """Return the dot products <image_i, text_j> of rows i0 to i1, (i1 - i0, N)."""
        dot = self.buffer[: (i1 - i0) * self.text.M].view(i1 - i0, self.text.M)
        images = self.image.rows(i0, i1)
        for j0, j1 in self.columns:
            torch.mm(images, self.text.rows(j0, j1).T, out=dot[:, j0:j1])
        return dot

    def products(
        self, i0: int, weights: Tensor, row_factor: Tensor, raw_image: Tensor | None, raw_text: Tensor | None
    ) -> None:
        """Write to `raw_image` the products of weights and texts, and add to `raw_text` those of weights and images.

        The weights are those in `weights` times the factor of their row. Each factor multiplies one side of a product,
        because weights that include the factors of a solved batch would be subnormal numbers, which are slow.
        """
        images = self.image.rows(i0, i0 + len(weights))
        scaled = images if raw_text is None else images * row_factor
        for j0, j1 in self.columns:
            texts, block = self.text.rows(j0, j1), weights[:, j0:j1]
            if raw_image is not None:
                add_product(raw_image, block, texts, keep=j0 > 0)
            if raw_text is not None:
                add_product(raw_text[j0:j1], block.T, scaled, keep=i0 > 0)
        if raw_image is not None:
            raw_image.mul_(row_factor)


def _features(p: Problem) -> tuple[Features, Features, Tensor | None]:
    """Return the features of both sides, and the norms whose addresses they hold."""
    if not p.normalize:
        return Features(p.image), Features(p.text), None
    M, N = p.image.shape[0], p.text.shape[0]
    norms, workers = empty(2, M + N), threads(*p.image.shape)  # inv_norm and outer of both sides
    flat = norms.view(-1)
    return normalized(p.image, flat, 0, workers), normalized(p.text, flat, 2 * M, workers), norms


def direction_fwd(
    p: Problem, count: Tensor | None, divisor: Tensor, needs: list[bool], dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """Compute `reference.direction_fwd`, with three products if features need gradients, else with one."""
    image, text, _norms = _features(p)
    panels, workers = _Panels(image, text), threads(image.M, text.M)
    s, n = p.scale.item(), divisor.item()
    labels = [None if y is None else y.int().contiguous() for y in p.labels or (None, None)]
    count = None if count is None else count.long().contiguous()
    problem = image.inv_norm, text.inv_norm, s, *map(address, labels), address(count), p.offset, p.exclude_self
    d_image, d_text = (
        x.new_empty(x.shape, dtype=saved_dtype(x)) if need else None for x, need in zip((p.image, p.text), needs)
    )
    # fp32 gradients are accumulated in the output
    raw_text = d_text if d_text is None or d_text.dtype == torch.float32 else empty(text.M, text.D)
    raw_rows = None if d_image is None or d_image.dtype == torch.float32 else empty(panels.size, image.D)
    row_factor = empty(panels.size, 1) if any(needs) else None
    loss = d_scale = 0.0
    for i0, i1 in panels.rows:
        dot = panels.dots(i0, i1)
        block = address(row_factor), dot.data_ptr(), i1 - i0, text.M, i0
        block_loss, block_d_scale = native.module.direction_fwd(*problem, *block, workers)
        loss, d_scale = loss + block_loss, d_scale + block_d_scale
        if row_factor is None or not (needs[0] or needs[1]):
            continue
        raw = None
        if d_image is not None:
            raw = d_image[i0:i1] if raw_rows is None else raw_rows[: i1 - i0]
        panels.products(i0, dot, row_factor[: i1 - i0], raw, raw_text)
        if raw is not None and d_image is not None:
            image.finish(raw, image.rows(i0, i1), i0, s / n, workers)
            if raw_rows is not None:
                d_image[i0:i1].copy_(raw)
    if d_text is not None and raw_text is not None:
        text.finish_all(raw_text, d_text, s / n, workers)
    return (
        p.image.new_full((), loss / n, dtype=dtype),
        d_image,
        d_text,
        p.scale.new_full((), d_scale / n) if needs[2] else None,
    )
