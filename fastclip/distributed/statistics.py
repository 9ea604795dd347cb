"""Statistics of a batch that lies on several ranks: own rows against all columns, then columns to their owners.

Rank r holds some images and some texts. It computes the rows of the logits of its images once; a column's sums come
from all ranks, and are merged by the text's rank, in rank order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastclip.distributed.agreement import Shards
from fastclip.distributed.collectives import exchange_columns, gather_rows
from fastclip.distributed.ring import ring_statistics
from fastclip.ops import Statistics, TopLogits, contrastive_maxima, contrastive_statistics, merge_logsumexp

__all__ = ["largest_over_ranks", "sharded_maxima", "sharded_statistics"]

_Ids = tuple[Tensor, Tensor] | None


def sharded_statistics(
    image: Tensor, text: Tensor, scale: Tensor, ids: _Ids, shards: Shards, comm: str, **options: Any
) -> Statistics:
    """Differentiable statistics of this rank's images and texts in the whole batch.

    image (M, D), text (N, D): this rank's; ids: of its images, and of all texts. "gather": all texts are here at once;
    "ring": those of one rank at a time. Either way the gradient is that of the sum of all ranks' losses.
    """
    if comm == "ring":
        stats = ring_statistics(image, text, scale, ids, sizes=shards.texts, group=shards.group, **options)
    else:
        texts = gather_rows(text, shards.texts, shards.group, after=None if ids is None else ids[1])
        stats = contrastive_statistics(image, texts, scale, ids, offset=shards.own_texts.start, **options)
    return _own_columns(stats, shards)


def sharded_maxima(
    image: Tensor, text: Tensor, scale: Tensor, ids: _Ids, shards: Shards, **options: Any
) -> tuple[Statistics, TopLogits]:
    """The same statistics and the largest logits with them, without gradient."""
    texts = gather_rows(text, shards.texts, shards.group, after=None if ids is None else ids[1])
    stats, top = contrastive_maxima(image, texts, scale, ids, offset=shards.own_texts.start, **options)
    columns = exchange_columns(torch.stack([top.col_neg, top.col_pos]), shards.texts, shards.group)
    col_neg, col_pos = columns.amax(0)
    return _own_columns(stats, shards), TopLogits(top.row_neg, col_neg, top.row_pos, col_pos)


def largest_over_ranks(x: Tensor, shards: Shards) -> Tensor:
    """() of the rows (own size,) of every rank, which are not negative."""
    largest = x.amax() if len(x) else x.new_zeros(())
    return gather_rows(largest.reshape(1), [1] * shards.ranks, shards.group).amax()


def _own_columns(stats: Statistics, shards: Shards) -> Statistics:
    """Columns of this rank's texts from every rank's partial statistics of them."""
    own = shards.own_texts
    if not stats.col_pos_lse.shape[0]:  # one positive each, in its owner's rows
        (col_neg,) = exchange_columns(stats.col_neg[None], shards.texts, shards.group).unbind(1)
        columns = merge_logsumexp(col_neg), stats.col_pos[own], stats.col_pos_lse
    else:
        partial = torch.stack([stats.col_neg, stats.col_pos, stats.col_pos_lse])
        col_neg, col_pos, col_pos_lse = exchange_columns(partial, shards.texts, shards.group).unbind(1)
        columns = merge_logsumexp(col_neg), col_pos.sum(0), merge_logsumexp(col_pos_lse)
    col_neg, col_pos, col_pos_lse = columns
    rows = stats.row_neg, stats.row_pos, stats.row_pos_lse
    norms = stats.image_inv_norm, stats.text_inv_norm[own]
    return Statistics(rows[0], col_neg, rows[1], col_pos, rows[2], col_pos_lse, *norms)
