"""The checked batch of a loss: arguments, ranks and labels, and the statistics of its logits."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fastclip._backends.problem import Problem, Sides
from fastclip.distributed import (
    Shards,
    gather_rows,
    meet,
    reported,
    sharded_statistics,
)
from fastclip.losses.inputs.arguments import (
    can_be_read,
    check_features,
    check_labels,
    check_shard,
    check_share,
    flag,
    scalar,
)
from fastclip.losses.inputs.labels import KeptRows, keep_labelled, match_labels
from fastclip.losses.inputs.limits import check_margin, negative_limits
from fastclip.ops import (
    autocast_features,
    contrastive_statistics,
)

__all__ = ["Batch", "batch_size", "prepare", "statistics_of"]

_Pair = tuple[Tensor, Tensor]  # (images or rows, texts or columns)


class Batch(NamedTuple):
    """A checked problem, and what the loss needs besides its statistics."""

    problem: Problem  # labels are small ids; with shards, labels and limits of this rank's images and of all texts
    label_smoothing: float
    shards: Shards | None  # None if the features are the whole batch
    counts: _Pair | None  # number of positives of every row and of every column; None: one each
    counted: tuple[int | Tensor, int | Tensor]  # number of rows and of columns with a positive, on all ranks
    kept: KeptRows | None  # which rows of the caller's features these are; None: all
    bias: Tensor | None = None  # (), added to every logit; None: the loss has none


def prepare(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    *,
    normalize: bool,
    image_labels: Tensor | None,
    text_labels: Tensor | None,
    exclude_self: bool,
    ignore_label: int | None,
    label_smoothing: float,
    group: Any,
    agreed: dict[str, Any],
    equal_shards: bool,
    backend: str | None,
    negative_margin: float | None = None,
    comm: str = "gather",
    needs_positive: bool = True,
    more_scalars: dict[str, Any] | None = None,
) -> Batch:
    """Check the arguments, drop ignored rows, apply autocast, let the ranks agree, and match the labels.

    agreed: further options that must be equal on all ranks of `group`. needs_positive: a batch without a positive pair
    is an error. more_scalars: the bias by the name of its argument, if the loss has one.
    """
    with reported(group, equal_shards, image_features):
        normalize, exclude_self = flag("normalize", normalize), flag("exclude_self", exclude_self)
        paired = exclude_self or (image_labels is None and text_labels is None)
        may_be_empty = group is not None and not equal_shards  # a rank may have no row
        check_features(image_features, text_features, paired=paired, backend=backend, may_be_empty=may_be_empty)
        check_labels(image_features, text_features, image_labels, text_labels, exclude_self)
        label_smoothing = check_share("label_smoothing", label_smoothing)
        margin = check_margin(negative_margin)
        if label_smoothing and margin is not None:
            raise ValueError("negative_margin leaves pairs out that label_smoothing spreads the target over: pass one")
        scalars = {"logit_scale": logit_scale, **(more_scalars or {})}
        scalars = {name: scalar(name, x, image_features) for name, x in scalars.items()}
        kept = keep_labelled(image_labels, text_labels, ignore_label, exclude_self, group, equal_shards)
        if kept is not None:
            image_features, text_features = kept.of(image_features, text_features)
            image_labels, text_labels = kept.of(image_labels, text_labels)
        image, text, scale, *bias = autocast_features(image_features, text_features, *scalars.values())
        if group is not None:
            check_shard(backend, image, text, scale, *bias)
    shards = None
    if group is not None:
        agreed = {
            **agreed,
            "normalize": normalize,
            "exclude_self": exclude_self,
            "label_smoothing": label_smoothing,
            "negative_margin": margin,
            "labels": image_labels is not None,
            "ignore_label": None if ignore_label is None else int(ignore_label),
        }
        shards = meet(group, image, text, dict(zip(scalars, (scale, *bias))), agreed, equal_shards)
    labels: _Pair | None = None
    counts: _Pair | None = None
    counted: tuple[int | Tensor, int | Tensor] = batch_size(image, text, shards)
    if image_labels is not None and text_labels is not None:
        labels, counts, counted = _match(image_labels, text_labels, exclude_self, shards, needs_positive)
    problem = Problem(image, text, scale, labels, exclude_self=exclude_self, normalize=normalize)
    if margin is not None:
        problem = problem._replace(limits=negative_limits(problem, margin, counts, shards, comm, backend))
    return Batch(problem, label_smoothing, shards, counts, counted, kept, *bias)


def statistics_of(batch: Batch, comm: str, backend: str | None) -> Sides:
    """Return the differentiable statistics of a batch, or of this rank's images and texts within the whole batch."""
    if batch.shards is None:
        return contrastive_statistics(batch.problem, backend)
    return sharded_statistics(batch.problem, batch.shards, comm, backend)


def batch_size(image: Tensor, text: Tensor, shards: Shards | None) -> tuple[int, int]:
    """Return the numbers of images and texts of the whole batch."""
    return (image.shape[0], text.shape[0]) if shards is None else (sum(shards.images), sum(shards.texts))


def _match(
    image_labels: Tensor, text_labels: Tensor, exclude_self: bool, shards: Shards | None, needs_positive: bool
) -> tuple[_Pair, _Pair, _Pair]:
    """Return label ids, counts of positives, and the numbers of rows and columns that have any, as in `Batch`."""
    if shards is not None:
        image_labels = gather_rows(image_labels.long(), shards.images, shards.group)
        text_labels = gather_rows(text_labels.long(), shards.texts, shards.group, after=image_labels)
    (image_ids, text_ids), row_count, col_count = match_labels(image_labels, text_labels)
    if exclude_self:
        itself = (image_labels.long() == text_labels.long()).long()
        row_count, col_count = row_count - itself, col_count - itself
    if needs_positive and can_be_read(row_count) and not bool(row_count.any()):
        besides = " of another row" if exclude_self else ""
        raise ValueError(f"no image label equals a text label{besides}: the batch has no positive pair")
    rows_counted, cols_counted = ((count > 0).sum().clamp_min(1) for count in (row_count, col_count))
    if shards is not None:
        image_ids, row_count = image_ids[shards.own_images], row_count[shards.own_images]
        col_count = col_count[shards.own_texts]
    return (image_ids, text_ids), (row_count, col_count), (rows_counted, cols_counted)
