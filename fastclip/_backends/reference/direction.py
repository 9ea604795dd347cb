"""The loss of the rows alone, and its gradients in the forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fastclip._backends.problem import Problem, Side, SideGrads
from fastclip._backends.reference.contrastive import contrastive_fwd, derivatives, gradients, row_losses
from fastclip._backends.reference.matrix import in_dtypes, saved_dtype

__all__ = ["direction_fits", "direction_fwd"]


def direction_fits(image: Tensor, text: Tensor) -> bool:
    return True


def direction_fwd(
    p: Problem, count: Tensor | None, divisor: Tensor, needs: list[bool], dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """Return the sum of the rows' losses / divisor, () in `dtype`, and the gradients of image, text and scale.

    count: number of positives of every row, int64 (M,), or None without labels. divisor: int64 (). A gradient that
    `needs` excludes is None. The gradients of the features have `saved_dtype`.
    """
    stats = rows, cols = contrastive_fwd(p)
    loss = (row_losses(rows, count).sum() / divisor).to(dtype)
    if not any(needs):
        return loss, None, None, None
    d_rows = SideGrads(*(d / divisor for d in _row_derivatives(rows, count)))
    d_cols = SideGrads(*(torch.zeros_like(x) for x in (cols.neg, cols.pos, cols.pos_lse)))
    g, cosine, s = derivatives(p, stats, (d_rows, d_cols))
    grads = gradients(p, stats, s * g, (g * cosine).sum(), needs)
    return loss, *in_dtypes(grads, saved_dtype(p.image), saved_dtype(p.text), p.scale.dtype)


def _row_derivatives(side: Side, count: Tensor | None) -> SideGrads:
    """Return the derivatives of the `row_losses` with respect to the statistics."""
    if count is None:
        d_neg = torch.sigmoid(side.neg - side.pos)
        return SideGrads(d_neg, -d_neg, side.pos_lse)
    q = torch.where(count > 0, torch.where(count == 1, side.pos, side.pos_lse), 0.0)
    x = torch.where(count > 0, side.neg, -torch.inf) - q
    d_neg = torch.sigmoid(x)
    share = 1.0 / count.clamp_min(1).to(d_neg.dtype)
    d_pos = torch.where(count > 1, -share, torch.where(count == 1, -d_neg, 0.0))
    return SideGrads(d_neg, d_pos, torch.where(count > 1, torch.sigmoid(-x), 0.0))
