"""The contrastive loss: checks, and the few lines of torch that make a loss of the statistics."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip._backends import check_name
from fastclip._backends.reference import EPS
from fastclip.labels import match_labels
from fastclip.ops import autocast_dtype, autocast_features, contrastive_statistics

__all__ = ["contrastive_loss", "direction_loss", "mean_logits"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor = 1 / 0.07,
    *,
    normalize: bool = True,
    image_labels: Tensor | None = None,
    text_labels: Tensor | None = None,
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
    _check_features(image_features, text_features, image_labels, text_labels)
    _check_options(image_weight, label_smoothing, reduction, group, comm, backend)
    scale = _scale_tensor(logit_scale, image_features)
    image, text, scale = autocast_features(image_features, text_features, scale)
    matched = None if image_labels is None or text_labels is None else match_labels(image_labels, text_labels)
    checked = image.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere it would cost a wait
    if matched is not None and checked and not bool(matched.image_count.any()):
        raise ValueError("no image label equals a text label: the batch has no positive pair")

    stats = contrastive_statistics(
        image, text, scale, matched.ids if matched else None, normalize=normalize, backend=backend
    )
    row_mean, col_mean = mean_logits(image, text, scale, normalize) if label_smoothing else (None, None)
    row_count, col_count = (matched.image_count, matched.text_count) if matched else (None, None)
    row_loss = direction_loss(
        stats.row_neg, stats.row_pos, stats.row_pos_lse, row_count, smoothing=label_smoothing, mean_logit=row_mean
    )
    col_loss = direction_loss(
        stats.col_neg, stats.col_pos, stats.col_pos_lse, col_count, smoothing=label_smoothing, mean_logit=col_mean
    )
    if reduction == "none":
        return row_loss.to(scale.dtype), col_loss.to(scale.dtype)
    row_total, col_total = (
        (row_loss.sum(), col_loss.sum())
        if reduction == "sum"
        else (_mean(row_loss, row_count), _mean(col_loss, col_count))
    )
    return (image_weight * row_total + (1 - image_weight) * col_total).to(scale.dtype)


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
        loss = -F.logsigmoid(pos - neg)
        return loss if mean_logit is None else loss + smoothing * (pos - mean_logit)
    some, one = count > 0, count == 1
    mean_pos = pos / count.clamp_min(1)
    # Rows without a positive are given inputs of gradient 0 before softplus: its gradient at -inf - -inf is NaN.
    q = torch.where(some, torch.where(one, pos, pos_lse), 0.0)
    loss = -F.logsigmoid(q - torch.where(some, neg, -torch.inf))
    loss = loss + torch.where(count > 1, torch.where(some, pos_lse, 0.0) - mean_pos, 0.0)
    if mean_logit is not None:
        loss = loss + smoothing * (mean_pos - mean_logit)
    return torch.where(some, loss, 0.0)


def mean_logits(image: Tensor, text: Tensor, scale: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Mean of each row (M,) and of each column (N,) of the logits, through the mean features: O((M + N) D)."""

    def unit_factor(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, dim=1).clamp_min(EPS).reciprocal() if normalize else x.new_ones(len(x))

    with torch.autocast(image.device.type, enabled=False):
        image, text = image.to(scale.dtype), text.to(scale.dtype)
        r, c = unit_factor(image), unit_factor(text)
        mean_image, mean_text = r @ image / len(image), c @ text / len(text)
        return scale * r * (image @ mean_text), scale * c * (text @ mean_image)


def _mean(loss: Tensor, count: Tensor | None) -> Tensor:
    return loss.mean() if count is None else loss.sum() / (count > 0).sum().clamp_min(1)


def _describe(name: str, x: Tensor) -> str:
    return f"{name} {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"


def _check_features(image: Tensor, text: Tensor, image_labels: Tensor | None, text_labels: Tensor | None) -> None:
    for name, x in (("image_features", image), ("text_features", text)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")

    def both() -> str:  # only for errors: under torch.compile the shapes may be symbols
        return f"{_describe('image_features', image)} and {_describe('text_features', text)}"

    if not (image.is_floating_point() and text.is_floating_point()):
        raise TypeError(f"features must be floating tensors: {both()}")
    if image.dtype not in _DTYPES or text.dtype not in _DTYPES:
        raise TypeError(f"features must be float32, bfloat16, float16 or float64: {both()}")
    if image.dtype != text.dtype and autocast_dtype(image) != autocast_dtype(text):
        raise TypeError(f"features must have one dtype: {both()}")
    if image.device != text.device:
        raise ValueError(f"features must be on one device: {both()}")
    if image.dim() != 2 or text.dim() != 2:
        raise ValueError(f"features must be matrices (batch, D): {both()}")
    if image.shape[1] != text.shape[1]:
        raise ValueError(f"features must have the same D: {both()}")
    if image.shape[0] == 0 or text.shape[0] == 0 or image.shape[1] == 0:
        raise ValueError(f"features must not be empty: {both()}")
    if image_labels is None and text_labels is None:
        if image.shape[0] != text.shape[0]:
            raise ValueError(f"without labels there must be as many texts as images: {both()}")
        return
    if image_labels is None or text_labels is None:
        missing = "image_labels" if image_labels is None else "text_labels"
        raise ValueError(f"{missing} is missing: give image_labels and text_labels, or neither")
    _check_labels("image", image, image_labels)
    _check_labels("text", text, text_labels)


def _check_labels(side: str, x: Tensor, labels: Tensor) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{side}_labels must be a torch.Tensor, got {type(labels).__name__}")
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"{side}_labels must be integers: {_describe(side + '_labels', labels)}")
    if labels.dim() != 1 or labels.shape[0] != x.shape[0] or labels.device != x.device:
        raise ValueError(
            f"{side}_labels must hold one label a row: {_describe(side + '_labels', labels)} for "
            f"{_describe(side + '_features', x)}"
        )


def _check_options(
    image_weight: float, label_smoothing: float, reduction: str, group: Any, comm: str, backend: str | None
) -> None:
    for name, value in (("image_weight", image_weight), ("label_smoothing", label_smoothing)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if comm not in ("gather", "ring"):
        raise ValueError(f"comm must be 'gather' or 'ring', got {comm!r}")
    check_name(backend)
    if group is not None:
        raise NotImplementedError(
            "group= (one loss over the shards of several processes) is not in this version yet; without it the loss "
            "sees the features of this process only"
        )


def _scale_tensor(logit_scale: float | Tensor, image: Tensor) -> Tensor:
    dtype = torch.promote_types(image.dtype, torch.float32)
    if not isinstance(logit_scale, Tensor):
        if not isinstance(logit_scale, (int, float)):
            raise TypeError(f"logit_scale must be a number or a torch.Tensor, got {type(logit_scale).__name__}")
        return torch.full((), logit_scale, dtype=dtype, device=image.device)
    if logit_scale.is_complex():
        raise TypeError(f"logit_scale must be real: {_describe('logit_scale', logit_scale)}")
    if logit_scale.numel() != 1:
        raise ValueError(f"logit_scale must have one element: {_describe('logit_scale', logit_scale)}")
    return logit_scale.reshape(()).to(device=image.device, dtype=dtype)
