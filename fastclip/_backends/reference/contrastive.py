"""The statistics of the contrastive loss and their gradients, and the loss of each row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip._backends.problem import Problem, Side, SideGrads, Sides
from fastclip._backends.reference.matrix import (
    in_dtypes,
    inv_norms,
    largest,
    logsumexp,
    positive_and_negatives,
    softmax_weights,
    through_norm,
    unit_rows,
    wide_dtype,
)

__all__ = ["contrastive_bwd", "contrastive_fwd", "derivatives", "gradients", "row_losses"]


def contrastive_fwd(p: Problem, maxima: bool = False) -> Sides:
    """Return the statistics of the logits' rows (M,) and columns (N,), and with `maxima` also the largest logits.

    The statistics are in `wide_dtype`, because the loss is a difference of statistics, and a float32 near 100 has an
    error of 4e-6. The inverse norms are the result of `inv_norms`.
    """
    r, c = inv_norms(p.image, p.normalize), inv_norms(p.text, p.normalize)
    z = p.scale.to(r.dtype) * unit_rows(p.image, r) @ unit_rows(p.text, c).T
    positive, negatives = positive_and_negatives(z, p)
    z_positive = torch.where(positive, z, 0.0)
    dims, wide = (1, 0), wide_dtype(z.device)  # a row's statistics are over the columns
    pos_lse = [r.new_empty(0) if p.labels is None else logsumexp(z, positive, dim) for dim in dims]
    neg = [logsumexp(z, negative, dim) for negative, dim in zip(negatives, dims)]
    pos = [z_positive.sum(dim) for dim in dims]
    tops: list[list[Tensor]] = [[], []]
    if maxima:
        tops = [
            [largest(z.masked_fill(~kept, -torch.inf), dim) for kept in (negative, positive)]
            for negative, dim in zip(negatives, dims)
        ]
    rows, cols = (
        Side(neg.to(wide), pos.to(wide), pos_lse.to(wide), inv_norm, *(x.to(wide) for x in top))
        for neg, pos, pos_lse, inv_norm, top in zip(neg, pos, pos_lse, (r, c), tops)
    )
    return rows, cols


def contrastive_bwd(
    p: Problem, stats: Sides, grads: tuple[SideGrads, SideGrads], needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of image (M, D), text (N, D) and scale (), with None for those that `needs` excludes.

    `stats` are the results of `contrastive_fwd`, and `grads` the derivatives of the loss with respect to them.
    """
    g, cosine, s = derivatives(p, stats, grads)
    return in_dtypes(gradients(p, stats, s * g, (g * cosine).sum(), needs), *(x.dtype for x in p[:3]))


def derivatives(p: Problem, stats: Sides, grads: tuple[SideGrads, SideGrads]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the derivatives of the loss with respect to the logits (M, N), the cosines (M, N) and the scale ()."""
    dtype = stats[0].inv_norm.dtype
    rows, cols = (Side(*(x.to(dtype) for x in side.tensors())) for side in stats)
    d_rows, d_cols = (SideGrads(*(d.to(dtype) for d in side)) for side in grads)
    s = p.scale.to(dtype)
    u, v = unit_rows(p.image, rows.inv_norm), unit_rows(p.text, cols.inv_norm)
    cosine = u @ v.T
    z = s * cosine if p.limits is None else s * u @ v.T  # limits are compared with the bits of the forward pass
    positive, (row_negative, col_negative) = positive_and_negatives(z, p)
    g = softmax_weights(z, row_negative, rows.neg, d_rows.neg, 1)
    g = g + softmax_weights(z, col_negative, cols.neg, d_cols.neg, 0)
    at_positives = d_rows.pos[:, None] + d_cols.pos
    if p.labels is not None:
        at_positives = at_positives + softmax_weights(z, positive, rows.pos_lse, d_rows.pos_lse, 1)
        at_positives = at_positives + softmax_weights(z, positive, cols.pos_lse, d_cols.pos_lse, 0)
    return torch.where(positive, at_positives, g), cosine, s


def gradients(
    p: Problem, stats: Sides, d_cosine: Tensor, d_scale: Tensor, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the three gradients from the derivatives with respect to the cosines (M, N) and to the scale ()."""
    r, c = (side.inv_norm for side in stats)
    u, v = unit_rows(p.image, r), unit_rows(p.text, c)
    return (
        through_norm(d_cosine @ v, u, r, p.normalize) if needs[0] else None,
        through_norm(d_cosine.T @ u, v, c, p.normalize) if needs[1] else None,
        d_scale if needs[2] else None,
    )


def row_losses(side: Side, count: Tensor | None) -> Tensor:
    """Return the loss of each row (M,), or of each column (N,), from the statistics of that side.

    count: number of positives, or None for one each.

    Let q be the log-sum-exp over the positives. The log-sum-exp over all logits minus the mean positive logit equals
    softplus(neg - q) + q - pos / count. When the loss is close to 0, softplus and its derivative keep their relative
    accuracy, whereas the difference of log-sum-exp and logit, and its derivative softmax - 1, would be rounding errors.
    With a single positive, q equals pos, so q - pos / count is exactly 0. This difference is left out, because its
    rounding error would exceed a small loss.
    """
    if count is None:
        return _softplus(side.neg - side.pos)
    has_positive = count > 0
    # Rows without a positive get constant inputs before softplus, because its gradient at -inf - -inf is NaN.
    q = torch.where(has_positive, torch.where(count == 1, side.pos, side.pos_lse), 0.0)
    loss = _softplus(torch.where(has_positive, side.neg, -torch.inf) - q)
    mean_pos = side.pos / count.clamp_min(1)
    loss = loss + torch.where(count > 1, torch.where(has_positive, side.pos_lse, 0.0) - mean_pos, 0.0)
    return torch.where(has_positive, loss, 0.0)


def _softplus(x: Tensor) -> Tensor:
    """Return log(1 + exp x). torch's default threshold would return x itself above 20."""
    return F.softplus(x, threshold=64)
