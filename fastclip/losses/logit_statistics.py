"""Differentiable statistics of the logits, from which other losses are computed in a few lines of torch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip._backends.problem import Side
from fastclip.distributed import check_comm, check_group, reported
from fastclip.losses.inputs.batch import Batch, prepare, statistics_of

__all__ = ["LogitStatistics", "logit_statistics"]


class LogitStatistics(NamedTuple):
    """Result of `logit_statistics`: numbers of every image (M,) and of every text (N,), differentiable."""

    row_neg: Tensor  # (M,) log-sum-exp over the image's negatives, -inf if there are none
    col_neg: Tensor  # (N,) log-sum-exp over the text's negatives
    row_pos: Tensor  # (M,) sum of the logits of the image's positives, 0 if there are none
    col_pos: Tensor  # (N,) sum of the logits of the text's positives
    row_pos_lse: Tensor  # (M,) log-sum-exp over the image's positives, -inf if there are none
    col_pos_lse: Tensor  # (N,) log-sum-exp over the text's positives


def logit_statistics(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor = 1 / 0.07,
    *,
    normalize: bool = True,
    image_labels: Tensor | None = None,
    text_labels: Tensor | None = None,
    exclude_self: bool = False,
    ignore_label: int | None = None,
    negative_margin: float | None = None,
    group: Any = None,
    comm: str = "gather",
    equal_shards: bool = False,
    backend: str | None = None,
) -> LogitStatistics:
    """Compute log-sum-exps and sums of the M x N logits along both directions, with gradients, in bounded memory.

    Any loss that depends on the logits through these six vectors is a few lines of torch. Its forward and backward
    pass together take 8 M N D operations, and only the reference backend stores an M x N matrix whatever its size. The
    decoupled contrastive loss (Yeh et al. 2022), for example::

        s = fastclip.logit_statistics(image_features, text_features, logit_scale)
        loss = ((s.row_neg - s.row_pos) + (s.col_neg - s.col_pos)).mean() / 2

    The negatives of row i are the texts that are not its positives. Positives are never part of ``row_neg``, so that a
    difference such as ``row_neg - row_pos`` keeps its digits when a pair is solved. The loss of CLIP is
    ``softplus(row_neg - row_pos)``, and the log-sum-exp over all logits is ``logaddexp(row_neg, row_pos_lse)``.

    Arguments are those of `contrastive_loss`. A batch without a positive pair is allowed. Rows with ``ignore_label``
    have the values of rows without any logit: -inf, 0 and -inf, with gradient 0.

    Returns:
        `LogitStatistics`, six vectors in float64 for every dtype of the features (float32 on Apple's GPUs), because
        losses are differences of them. Without labels every row has one positive, and ``row_pos_lse`` is ``row_pos``.

        If ``group`` is given, the vectors describe this rank's images and texts within the whole batch. Gradients are
        those of the sum of all ranks' losses, while DDP and FSDP average them: if every rank returns
        ``W * x.sum() / n``, where W is the number of ranks and n the number of rows of the whole batch, the averaged
        gradient is that of the mean over the whole batch. With equal shards this is ``x.mean()``.

    Raises:
        ValueError, TypeError, RuntimeError: as `contrastive_loss`.
    """
    group = check_group(group)
    with reported(group, equal_shards, image_features):
        check_comm(comm)
    batch = prepare(
        image_features,
        text_features,
        logit_scale,
        normalize=normalize,
        image_labels=image_labels,
        text_labels=text_labels,
        exclude_self=exclude_self,
        ignore_label=ignore_label,
        label_smoothing=0.0,
        negative_margin=negative_margin,
        comm=comm,
        group=group,
        agreed={"function": "logit_statistics", "comm": comm},
        equal_shards=equal_shards,
        backend=backend,
        needs_positive=False,
    )
    rows, cols = (_complete(side, batch) for side in statistics_of(batch, comm, backend))
    row_neg, row_pos, row_pos_lse = rows
    col_neg, col_pos, col_pos_lse = cols
    if batch.kept is not None:
        row_neg, col_neg = batch.kept.spread(row_neg, col_neg, fill=-torch.inf)
        row_pos, col_pos = batch.kept.spread(row_pos, col_pos)
        row_pos_lse, col_pos_lse = batch.kept.spread(row_pos_lse, col_pos_lse, fill=-torch.inf)
    return LogitStatistics(row_neg, col_neg, row_pos, col_pos, row_pos_lse, col_pos_lse)


def _complete(side: Side, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return neg, pos and pos_lse of a side. Without labels, the log-sum-exp of the only positive is its logit."""
    return side.neg, side.pos, side.pos if batch.problem.labels is None else side.pos_lse
