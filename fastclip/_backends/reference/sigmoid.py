"""The pairwise sigmoid loss, and its gradients in the forward pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip._backends.problem import Problem
from fastclip._backends.reference.matrix import (
    inv_norms,
    positive_and_negatives,
    saved_dtype,
    through_norm,
    unit_rows,
    wide_dtype,
)

__all__ = ["sigmoid_fwd"]


def sigmoid_fwd(
    p: Problem, bias: Tensor, divisor: int, needs: list[bool], dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """Return sum_ij softplus(-sign_ij (z_ij + bias)) / divisor, () in `dtype`, and its four gradients.

    sign_ij is 1 at the positives and -1 elsewhere. A negative that exceeds the limit of its row or of its column is
    left out of the sum, and with `exclude_self` so is the pair (i, i + offset). The gradients are those of image, text,
    scale and bias (), with None for those that `needs` excludes. The gradients of the features have `saved_dtype`.
    """
    r, c = inv_norms(p.image, p.normalize), inv_norms(p.text, p.normalize)
    u, v = unit_rows(p.image, r), unit_rows(p.text, c)
    s = p.scale.to(r.dtype)
    cosine = u @ v.T
    z = s * cosine
    positive, (row_negative, col_negative) = positive_and_negatives(z, p)  # limits do not include the bias
    z = z + bias.to(r.dtype)
    sign = torch.where(positive, -1.0, 1.0).to(z.dtype)
    counted = positive | (row_negative & col_negative)
    loss = -torch.where(counted, F.logsigmoid(-sign * z), 0.0).sum(dtype=wide_dtype(z.device))
    loss = (loss / divisor).to(dtype)
    if not any(needs):
        return loss, None, None, None, None
    g = torch.where(counted, sign * torch.sigmoid(sign * z), 0.0) / divisor
    return (
        loss,
        through_norm(s * (g @ v), u, r, p.normalize).to(saved_dtype(p.image)) if needs[0] else None,
        through_norm(s * (g.T @ u), v, c, p.normalize).to(saved_dtype(p.text)) if needs[1] else None,
        (g * cosine).sum().to(p.scale.dtype) if needs[2] else None,
        g.sum().to(bias.dtype) if needs[3] else None,
    )
