"""The mean loss of pairs without labels, and its gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastclip._backends.problem import Problem, Side, SideGrads
from fastclip._backends.reference.contrastive import contrastive_bwd, contrastive_fwd, row_losses

__all__ = ["plain_bwd", "plain_fwd", "plain_saved"]


def plain_saved(N: int) -> int:
    """Return how many fp32 numbers `plain_fwd` saves for `plain_bwd` with N pairs."""
    return 12 * N


def plain_fwd(
    image: Tensor, text: Tensor, scale: Tensor, image_weight: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Return the mean loss () of pairs without labels and what `plain_bwd` needs, (plain_saved(N),), both in fp32.

    image and text (N, D) may not be fp64, and scale () is fp32. The only positive of row i is column i. The loss is
    image_weight times the mean over images of softplus(row_neg - row_pos), plus 1 - image_weight times the mean over
    texts of softplus(col_neg - col_pos).
    """
    sides = contrastive_fwd(Problem(image, text, scale, normalize=normalize))
    rows, cols = (row_losses(side, None).mean() for side in sides)
    loss = image_weight * rows + (1.0 - image_weight) * cols
    saved = [x.double() for side in sides for x in (side.neg, side.pos, side.inv_norm)]
    return loss.float(), torch.cat(saved).view(torch.float32)


def plain_bwd(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    saved: Tensor,
    image_weight: float,
    normalize: bool,
    d_loss: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of image, text and scale for d_loss (), with None for those that `needs` excludes."""
    N, none = image.shape[0], saved.new_empty(0)
    stats, grads = [], []
    weights = image_weight, 1.0 - image_weight
    for weight, (neg, pos, inv_norm) in zip(weights, saved.view(torch.float64).view(2, 3, N)):
        d_neg = weight * d_loss.double() / N * torch.sigmoid(neg - pos)
        stats.append(Side(neg, pos, none, inv_norm.float()))
        grads.append(SideGrads(d_neg, -d_neg, none))
    p = Problem(image, text, scale, normalize=normalize)
    return contrastive_bwd(p, (stats[0], stats[1]), (grads[0], grads[1]), list(needs))
