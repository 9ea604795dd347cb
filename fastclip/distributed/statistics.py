"""Statistics of a batch that is sharded over several ranks.

Each rank computes the logits of its images against the texts of all ranks once. That completes the statistics of its
rows. The statistics of a column are partial on every rank: they are sent to the rank that has the text and merged there
in rank order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastclip._backends.problem import Problem, Side, Sides, TeacherSide, TeacherSides
from fastclip.distributed.agreement import Shards
from fastclip.distributed.collectives import exchange_columns, gather_rows
from fastclip.distributed.ring_losses import ring_statistics
from fastclip.ops import contrastive_maxima, contrastive_statistics, distillation_statistics, merge_logsumexp

__all__ = [
    "largest_over_ranks",
    "sharded_distillation",
    "sharded_maxima",
    "sharded_statistics",
    "whole_rows",
    "with_all_texts",
]


def sharded_statistics(p: Problem, shards: Shards, comm: str, backend: str | None) -> Sides:
    """Return differentiable statistics of this rank's images and texts in the whole batch.

    `p.image` (M, D) and `p.text` (N, D) are the features of this rank. `p.labels` and `p.limits` are those of this
    rank's images and of all texts. If `comm` is "gather", a rank holds all texts at once. If it is "ring", a rank holds
    the texts of a few ranks at a time. In both cases gradients are those of the sum of all ranks' losses.
    """
    if comm == "ring":
        stats = ring_statistics(p, backend, shards.texts, shards.group)
    else:
        stats = contrastive_statistics(with_all_texts(p, shards), backend)
    return _own_columns(stats, shards, p.labels is not None)


def sharded_maxima(p: Problem, shards: Shards, backend: str | None) -> Sides:
    """Return the statistics of `sharded_statistics` and the largest logits. No result has a gradient."""
    return _own_columns(contrastive_maxima(with_all_texts(p, shards), backend), shards, p.labels is not None)


def with_all_texts(p: Problem, shards: Shards, after: Tensor | None = None) -> Problem:
    """Return the problem of this rank's images and the texts of all ranks, which are gathered.

    after: result of the previous collective, if that is not the exchange of the labels or limits.
    """
    if own := p.limits or p.labels:
        _, after = own
    return p._replace(text=gather_rows(p.text, shards.texts, shards.group, after), offset=shards.own_texts.start)


def sharded_distillation(
    p: Problem, teachers: Sequence[Problem], shards: Shards, backend: str | None
) -> tuple[Sides, TeacherSides]:
    """Return the statistics of this rank's images and texts in the whole batch, as `distillation_statistics` does.

    The features of the student p and of the teachers are those of this rank. Texts are gathered.
    """
    whole = [with_all_texts(p, shards)]
    for t in teachers:
        whole.append(with_all_texts(t, shards, after=whole[-1].text))
    (rows, cols), (of_rows, of_cols) = distillation_statistics(whole[0], whole[1:], backend)
    here, K = shards.own_texts, len(teachers)
    partial = torch.cat([cols.neg[None], of_cols.neg, of_cols.cosine])
    neg, others, cosines = exchange_columns(partial, shards.texts, shards.group).split([1, K, K], dim=1)
    # A rank's mean has the weight of its share of the sum of exponentials, which is 0 if it has no negative
    merged = merge_logsumexp(others.detach())
    shares = torch.where(others == -torch.inf, 0.0, (others - merged).exp()).detach()
    own_cols = Side(merge_logsumexp(neg[:, 0]), cols.pos[here], cols.pos_lse, cols.inv_norm[here])
    return (rows, own_cols), (of_rows, TeacherSide(merged, of_cols.pos[:, here], (shares * cosines).sum(0)))


def whole_rows(p: Problem, shards: Shards | None, image_weight: float) -> Problem:
    """Return the problem whose rows are the images if `image_weight` is 1, or the texts if it is 0.

    With shards the rows are those of this rank, and the columns those of all ranks, with gradients summed over ranks.
    """
    if image_weight == 1.0:
        return p if shards is None else with_all_texts(p, shards)
    image, labels, offset = p.image, p.labels and (p.labels[1], p.labels[0]), -p.offset
    if shards is not None:
        if labels is not None:
            labels = labels[0][shards.own_texts], gather_rows(labels[1], shards.images, shards.group)
        image = gather_rows(image, shards.images, shards.group, after=labels and labels[1])
        offset = shards.own_images.start
    return p._replace(image=p.text, text=image, labels=labels, offset=offset)


def largest_over_ranks(vectors: Sequence[Tensor], shards: Shards, after: Tensor | None = None) -> Tensor:
    """Return the largest element of each of the K vectors (size,), over all ranks, (K,). No element may be negative.

    after: result of the previous collective.
    """
    largest = torch.stack([x.amax() if len(x) else x.new_zeros(()) for x in vectors])
    return gather_rows(largest[None], [1] * shards.ranks, shards.group, after).amax(0)


def _own_columns(stats: Sides, shards: Shards, labels: bool) -> Sides:
    """Replace the partial statistics of all columns by the complete statistics of this rank's texts."""
    rows, cols = stats
    here = shards.own_texts
    # Without labels the only positive of a column is a row of the rank that has the text, so `pos` is complete there
    partial = [cols.neg, cols.pos, cols.pos_lse] if labels else [cols.neg]
    if cols.neg_top is not None and cols.pos_top is not None:
        partial += [cols.neg_top, cols.pos_top]
    neg, *others = exchange_columns(torch.stack(partial), shards.texts, shards.group).unbind(1)
    own = Side(merge_logsumexp(neg), cols.pos[here], cols.pos_lse, cols.inv_norm[here])
    if labels:
        own = own._replace(pos=others[0].sum(0), pos_lse=merge_logsumexp(others[1]))
    if cols.neg_top is not None:
        own = own._replace(neg_top=others[-2].amax(0), pos_top=others[-1].amax(0))
    return rows, own
