"""What a training loop wants to look at: log-sum-exps, losses and in-batch accuracy."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip._backends.reference import norms
from fastclip.distributed import check_group, largest_over_ranks, sharded_maxima
from fastclip.loss import Batch, direction_losses, prepare
from fastclip.ops import contrastive_maxima
from fastclip.ties import TIE

__all__ = ["ContrastiveStats", "contrastive_stats"]


class ContrastiveStats(NamedTuple):
    """What `contrastive_stats` returns; detached."""

    row_lse: Tensor  # (M,) log-sum-exp of the image's logits
    col_lse: Tensor  # (N,) of the text's
    row_loss: Tensor  # (M,) the image's loss; 0 without a positive
    col_loss: Tensor  # (N,) the text's
    row_hit: Tensor  # (M,) bool: the image's largest logit is a positive
    col_hit: Tensor  # (N,) bool: the text's


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
    group: Any = None,
    equal_shards: bool = False,
    backend: str | None = None,
) -> ContrastiveStats:
    """Log-sum-exps, losses and in-batch top-1 of both directions, in one pass over logits that are never stored.

    Arguments and errors are those of `contrastive_loss`; with ``group`` the results are those of this rank's images and
    texts in the whole batch, for which all texts are gathered. A tie is a miss: an image whose largest negative comes
    within 2^-20 |logit_scale| |image| max |text| of its largest positive (normalised: 2^-20 |logit_scale|) has no hit,
    so that a batch with the same text twice, or a collapsed model, scores the same whichever way rounding goes. Rows
    without a positive have loss 0 and no hit; rows that are not finite have no hit. Rows with ``ignore_label`` have
    loss 0, no hit, and the log-sum-exp of nothing, -inf.

    Returns:
        `ContrastiveStats`: row_lse (M,), col_lse (N,), row_loss (M,), col_loss (N,), float32 (for float64 features
        float64); row_hit (M,), col_hit (N,), bool. ``row_hit.float().mean()`` is the in-batch image -> text accuracy.
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
            group=group,
            agreed={"function": "contrastive_stats"},
            equal_shards=equal_shards,
            backend=backend,
        )
        problem = batch.image, batch.text, batch.scale, batch.ids
        if batch.shards is None:
            stats, top = contrastive_maxima(*problem, **batch.options)
        else:
            stats, top = sharded_maxima(*problem, batch.shards, **batch.options)
        row_loss, col_loss = direction_losses(batch, stats)
        row_tie, col_tie = _ties(batch)
        dtype = batch.scale.dtype
        without = batch.ids is None
        lse = (
            _all(stats.row_neg, stats.row_pos if without else stats.row_pos_lse, top.row_pos).to(dtype),
            _all(stats.col_neg, stats.col_pos if without else stats.col_pos_lse, top.col_pos).to(dtype),
        )
        loss = row_loss.to(dtype), col_loss.to(dtype)
        hit = (
            (top.row_pos - top.row_neg > row_tie) & row_loss.isfinite(),
            (top.col_pos - top.col_neg > col_tie) & col_loss.isfinite(),
        )
        if batch.kept is not None:
            spread = batch.kept.spread
            lse, loss, hit = spread(*lse, fill=-torch.inf), spread(*loss), spread(*hit)
        return ContrastiveStats(*lse, *loss, *hit)


def _all(neg: Tensor, pos: Tensor, top_pos: Tensor) -> Tensor:
    """log-sum-exp over negatives and positives."""
    return torch.logaddexp(neg, torch.where(top_pos == -torch.inf, -torch.inf, pos))


def _ties(batch: Batch) -> tuple[Tensor, Tensor]:
    """How far apart the largest logits of a row (M,) and of a column (N,) must be to be told apart."""
    near = batch.scale.abs() * TIE
    if batch.options["normalize"]:
        return near, near
    row, col = norms(batch.image), norms(batch.text)
    if batch.shards is None:
        row_top, col_top = row.amax(), col.amax()
    else:
        row_top, col_top = (largest_over_ranks(x, batch.shards) for x in (row, col))
    return near * row * col_top, near * col * row_top
