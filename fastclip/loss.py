"""The contrastive loss: the few lines of torch that make a loss of the statistics."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip._backends.reference import EPS
from fastclip.checks import check_features, check_group, check_labels, check_reduction, check_share, scalar
from fastclip.labels import match_labels
from fastclip.ops import Statistics, autocast_features, contrastive_statistics

__all__ = ["Batch", "contrastive_loss", "direction_losses", "prepare"]


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor = 1 / 0.07,
    *,
    normalize: bool = True,
    image_labels: Tensor | None = None,
    text_labels: Tensor | None = None,
    exclude_self: bool = False,
    image_weight: float = 0.5,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    group: Any = None,
    comm: str = "gather",
    equal_shards: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Symmetric cross-entropy over the M x N similarities of images and texts, never stored.

    logits_ij = logit_scale <image_i, text_j>, of the normalised features unless ``normalize=False``. The loss is
    ``image_weight`` times the mean over images of -log softmax at their texts, plus the rest times the mirrored mean
    over texts (CLIP, Radford et al. 2021, figure 3; InfoNCE in both directions).

    Args:
        image_features: (M, D), float32, bfloat16, float16 or float64.
        text_features: (N, D), of the same dtype and device. Text i belongs to image i and M = N, unless labels say
            otherwise.
        logit_scale: what multiplies the cosines, 1 / temperature, already exponentiated: a number, or a tensor of
            one element (its gradient is computed).
        normalize: divide each row by its norm (at least 1e-12, so that zero rows stay finite), with gradient.
        image_labels, text_labels: int64, (M,) and (N,). Every pair with equal labels is a positive, and the loss of
            a row is the mean of -log softmax over its positives (UniCL, Yang et al. 2022, equation 3; Florence).
            Rows and columns without a positive are left out.
        exclude_self: with labels, pair (i, i) is neither a positive nor a negative: for features against themselves,
            ``contrastive_loss(x, x, s, image_labels=y, text_labels=y, exclude_self=True)``, where y numbers the image
            that each view was made of (SimCLR, Chen et al. 2020) or its class (SupCon, Khosla et al. 2020, L_out).
        image_weight: w in [0, 1], the weight of image -> text (ConVIRT, Zhang et al. 2020: 0.75). ALIGN's sum of both
            directions is twice the default mean.
        label_smoothing: eps in [0, 1]: targets (1 - eps) / n on a row's n positives plus eps / N on all (ALIGN: 0.1).
        reduction: "mean"; "sum", w sum_i + (1 - w) sum_j; or "none", the pair (per image (M,), per text (N,)),
            unweighted.
        group, comm, equal_shards: for a loss over the shards of several processes; not in this version yet.
        backend: a name from `fastclip.backends()`; None takes the best that serves these features.

    Returns:
        A scalar, or with "none" two vectors; float32, for float64 features float64.

    Raises:
        ValueError: shapes, devices, options or labels that do not fit, or no positive pair at all (that last one on
            a CPU outside torch.compile; elsewhere the loss is 0).
        TypeError: features that are not floating tensors of one dtype, labels that are not integers.
        RuntimeError: an explicit backend that cannot serve.
        NotImplementedError: ``group`` is given.
    """
    check_share("image_weight", image_weight)
    check_reduction(reduction, ("mean", "sum", "none"))
    check_group(group, comm)
    batch = prepare(
        image_features,
        text_features,
        logit_scale,
        normalize=normalize,
        image_labels=image_labels,
        text_labels=text_labels,
        exclude_self=exclude_self,
        label_smoothing=label_smoothing,
        backend=backend,
    )
    stats = contrastive_statistics(batch.image, batch.text, batch.scale, batch.ids, **batch.options)
    dtype = batch.scale.dtype
    alike = batch.row_count is None and not label_smoothing and len(stats.row_neg) == len(stats.col_neg)
    if alike and reduction == "mean" and image_weight == 0.5:  # one mean of all losses: half as many operations
        neg, pos = torch.cat((stats.row_neg, stats.col_neg)), torch.cat((stats.row_pos, stats.col_pos))
        return direction_loss(neg, pos, stats.row_pos_lse, None).mean().to(dtype)
    row_loss, col_loss = direction_losses(batch, stats)
    if reduction == "none":
        return row_loss.to(dtype), col_loss.to(dtype)
    row_total, col_total = (
        (row_loss.sum(), col_loss.sum())
        if reduction == "sum"
        else (_mean(row_loss, batch.row_count), _mean(col_loss, batch.col_count))
    )
    return torch.lerp(col_total, row_total, image_weight).to(dtype)


class Batch(NamedTuple):
    """A checked problem: what the ops are called with, and what its loss is made with."""

    image: Tensor
    text: Tensor
    scale: Tensor
    ids: tuple[Tensor, Tensor] | None  # labels, as small numbers
    options: dict[str, Any]  # of the ops
    label_smoothing: float
    row_count: Tensor | None  # positives of every row and column; None: one each
    col_count: Tensor | None


def prepare(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    *,
    normalize: bool,
    image_labels: Tensor | None,
    text_labels: Tensor | None,
    exclude_self: bool,
    label_smoothing: float,
    backend: str | None,
) -> Batch:
    """Checks; autocast; labels as small numbers, and how many positives each row and column has."""
    paired = exclude_self or (image_labels is None and text_labels is None)
    check_features(image_features, text_features, paired=paired, backend=backend)
    check_labels(image_features, text_features, image_labels, text_labels, exclude_self)
    check_share("label_smoothing", label_smoothing)
    scale = scalar("logit_scale", logit_scale, image_features)
    image, text, scale = autocast_features(image_features, text_features, scale)
    options = {"exclude_self": exclude_self, "normalize": normalize, "backend": backend}
    if image_labels is None or text_labels is None:
        return Batch(image, text, scale, None, options, label_smoothing, None, None)
    ids, row_count, col_count = match_labels(image_labels, text_labels)
    if exclude_self:
        own = (image_labels == text_labels).long()
        row_count, col_count = row_count - own, col_count - own
    # elsewhere it would cost a wait
    if image.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(row_count.any()):
        besides = " besides its own" if exclude_self else ""
        raise ValueError(f"no image label equals a text label{besides}: the batch has no positive pair")
    return Batch(image, text, scale, ids, options, label_smoothing, row_count, col_count)


def direction_losses(batch: Batch, stats: Statistics) -> tuple[Tensor, Tensor]:
    """Loss of every image (M,) and of every text (N,)."""
    row_mean, col_mean = mean_logits(batch) if batch.label_smoothing else (None, None)
    eps = batch.label_smoothing
    return (
        direction_loss(
            stats.row_neg, stats.row_pos, stats.row_pos_lse, batch.row_count, smoothing=eps, mean_logit=row_mean
        ),
        direction_loss(
            stats.col_neg, stats.col_pos, stats.col_pos_lse, batch.col_count, smoothing=eps, mean_logit=col_mean
        ),
    )


def direction_loss(
    neg: Tensor,
    pos: Tensor,
    pos_lse: Tensor,
    count: Tensor | None,
    *,
    smoothing: float = 0.0,
    mean_logit: Tensor | None = None,
) -> Tensor:
    """Loss (M,) of each row, or mirrored (N,) of each column, from its statistics.

    neg, pos, pos_lse: log-sum-exp over the negatives, sum and log-sum-exp over the positives; count: the number of
    positives, None for one each; mean_logit: mean of the row's logits, for label smoothing.

    With q the log-sum-exp over the positives, log-sum-exp over all minus the mean positive is
    softplus(neg - q) + q - pos / count. Unlike softmax - 1, softplus keeps its digits when a pair is solved. One
    positive is its own formula: there q is pos exactly, and the difference would lose half the digits.
    """
    if count is None:
        loss = _softplus(neg - pos)
        return loss if mean_logit is None else loss + smoothing * (pos - mean_logit)
    some, one = count > 0, count == 1
    mean_pos = pos / count.clamp_min(1)
    # Rows without a positive are given inputs of gradient 0 before softplus: its gradient at -inf - -inf is NaN.
    q = torch.where(some, torch.where(one, pos, pos_lse), 0.0)
    loss = _softplus(torch.where(some, neg, -torch.inf) - q)
    loss = loss + torch.where(count > 1, torch.where(some, pos_lse, 0.0) - mean_pos, 0.0)
    if mean_logit is not None:
        loss = loss + smoothing * (mean_pos - mean_logit)
    return torch.where(some, loss, 0.0)


def mean_logits(batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean of each row (M,) and of each column (N,) of the logits, through the mean features: O((M + N) D)."""
    image, text, scale = batch[:3]
    normalize = batch.options["normalize"]

    def unit_factor(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, dim=1).clamp_min(EPS).reciprocal() if normalize else x.new_ones(len(x))

    with torch.autocast(image.device.type, enabled=False):
        image, text = image.to(scale.dtype), text.to(scale.dtype)
        r, c = unit_factor(image), unit_factor(text)
        row_mean = r * (image @ (c @ text / len(text)))
        col_mean = c * (text @ (r @ image / len(image)))
        if batch.options["exclude_self"]:  # the mean of the others
            N = len(text)
            own = r * c * torch.linalg.vecdot(image, text)
            row_mean, col_mean = ((N * mean - own) / max(N - 1, 1) for mean in (row_mean, col_mean))
        return scale * row_mean, scale * col_mean


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp x), which torch's default takes for x already from 20 on."""
    return F.softplus(x, threshold=64)


def _mean(loss: Tensor, count: Tensor | None) -> Tensor:
    return loss.mean() if count is None else loss.sum() / (count > 0).sum().clamp_min(1)
