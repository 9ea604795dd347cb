"""Statistics for monitoring training: log-sum-exps, losses and in-batch accuracy."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip._backends.problem import Side
from fastclip.distributed import check_group, sharded_maxima
from fastclip.losses.contrastive import direction_losses
from fastclip.losses.inputs.batch import prepare
from fastclip.losses.inputs.limits import ties
from fastclip.ops import contrastive_maxima

__all__ = ["ContrastiveStats", "contrastive_stats"]


class ContrastiveStats(NamedTuple):
    """Result of `contrastive_stats`. All tensors are detached."""

    row_lse: Tensor  # (M,) log-sum-exp of the image's logits
    col_lse: Tensor  # (N,) log-sum-exp of the text's logits
    row_loss: Tensor  # (M,) loss of the image, 0 without a positive
    col_loss: Tensor  # (N,) loss of the text, 0 without a positive
    row_hit: Tensor  # (M,) bool: the image's largest logit is a positive
    col_hit: Tensor  # (N,) bool: the text's largest logit is a positive


def contrastive_stats(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor = 1 / 0.07,
    *,
    normalize: bool = True,
    image_labels: Tensor | None = None,
    text_labels: Tensor | None = None,
    exclude_self: bool = False,
    ignore_label: int | None = None,
    label_smoothing: float = 0.0,
    negative_margin: float | None = None,
    group: Any = None,
    equal_shards: bool = False,
    backend: str | None = None,
) -> ContrastiveStats:
    """Compute log-sum-exps, losses and in-batch top-1 hits of both directions, in one pass, without storing the logits.

    Arguments and errors are those of `contrastive_loss`. If ``group`` is given, all texts are gathered, and the results
    describe this rank's images and texts within the whole batch.

    A tie is a miss: an image has a hit only if its largest positive exceeds its largest negative by more than
    2^-20 |logit_scale| ||image|| max ||text||, where ||x|| is the norm of a row and the maximum is over all texts. The
    margin of a text is 2^-20 |logit_scale| ||text|| max ||image||. For normalised features both margins are
    2^-20 |logit_scale|. The accuracy of a batch that contains a text twice, or of a collapsed model, therefore does not
    depend on rounding.

    Negatives that ``negative_margin`` leaves out count nowhere, neither in log-sum-exps nor as rivals of a positive.

    Rows without a positive have loss 0 and no hit. Rows that are not finite have no hit. Rows with ``ignore_label``
    have loss 0, no hit and log-sum-exp -inf.

    Returns:
        `ContrastiveStats`: row_lse (M,), col_lse (N,), row_loss (M,) and col_loss (N,) in float32 (float64 for float64
        features), row_hit (M,) and col_hit (N,) in bool. ``row_hit.float().mean()`` is the in-batch image -> text
        accuracy.
    """
    group = check_group(group)
    with torch.no_grad():
        batch = prepare(
            image_features,
            text_features,
            logit_scale,
            normalize=normalize,
            image_labels=image_labels,
            text_labels=text_labels,
            exclude_self=exclude_self,
            ignore_label=ignore_label,
            label_smoothing=label_smoothing,
            negative_margin=negative_margin,
            group=group,
            agreed={"function": "contrastive_stats"},
            equal_shards=equal_shards,
            backend=backend,
        )
        if batch.shards is None:
            sides = contrastive_maxima(batch.problem, backend)
        else:
            sides = sharded_maxima(batch.problem, batch.shards, backend)
        losses = direction_losses(batch, sides)
        margins = ties(batch.problem, batch.shards, after=sides[1].neg)
        hits = [_hits(side, tie) & loss.isfinite() for side, loss, tie in zip(sides, losses, margins)]
        dtype = batch.problem.scale.dtype
        row_lse, col_lse = (_logsumexp(side, batch.problem.labels is not None).to(dtype) for side in sides)
        row_loss, col_loss = (loss.to(dtype) for loss in losses)
        row_hit, col_hit = hits
        if batch.kept is not None:
            row_lse, col_lse = batch.kept.spread(row_lse, col_lse, fill=-torch.inf)
            row_loss, col_loss = batch.kept.spread(row_loss, col_loss)
            row_hit, col_hit = batch.kept.spread(row_hit, col_hit)
        return ContrastiveStats(row_lse, col_lse, row_loss, col_loss, row_hit, col_hit)


def _logsumexp(side: Side, labels: bool) -> Tensor:
    """Return the log-sum-exp over negatives and positives."""
    assert side.pos_top is not None
    pos = side.pos_lse if labels else side.pos  # the log-sum-exp of a single positive is its logit
    return torch.logaddexp(side.neg, torch.where(side.pos_top == -torch.inf, -torch.inf, pos))


def _hits(side: Side, tie: Tensor) -> Tensor:
    """Return a mask of the rows whose largest positive exceeds the largest negative by more than `tie`."""
    assert side.pos_top is not None and side.neg_top is not None
    return side.pos_top - side.neg_top > tie
