"""The loss of nested features, whose first numbers are features by themselves."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from fastclip.distributed import check_group, meet, reported
from fastclip.losses.contrastive import contrastive_loss
from fastclip.losses.global_contrastive import GlobalContrastiveLoss
from fastclip.losses.inputs.arguments import check_features, describe, number

__all__ = ["matryoshka_loss"]


def matryoshka_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor = 1 / 0.07,
    *,
    prefixes: Iterable[int],
    weights: Iterable[float] | None = None,
    loss: Callable[..., Any] | None = None,
    **options: Any,
) -> Tensor:
    """Compute the weighted sum of `contrastive_loss` over prefixes of the features, not divided by their number.

    Features that are trained with it can be cut to the length of any of the prefixes (Matryoshka representation
    learning, Kusupati et al. 2022, equation 1). Each prefix is normalised by itself. Include D in ``prefixes`` to train
    the whole features as well.

    Args:
        image_features, text_features, logit_scale: as in `contrastive_loss`. The prefixes are views: a backend reads
            them in place if it can read the whole features so.
        prefixes: distinct integers from 1 to D, such as (64, 128, 256): the loss is computed of the first 64 numbers
            of each row, of the first 128, and so on.
        weights: one finite number per prefix (default: 1 each).
        loss: function to use in place of `contrastive_loss`, such as `sigmoid_loss`, which is called with the prefixes
            of both features, ``logit_scale`` and the options. It must normalise the features itself, because a prefix
            of a row of norm 1 is shorter than 1: `ClipLoss` and ``normalize=False`` compute other logits.
        options: options of `contrastive_loss` (or of ``loss``), except ``reduction="none"``.

    Returns:
        A scalar, float32, or float64 for float64 features.

    Raises:
        ValueError: prefixes are missing, repeated or not in the range from 1 to D, the number of weights differs, or a
            weight is not finite. Also the errors of the loss.
        TypeError: a prefix is not an integer, a weight is not a number, or ``loss`` is not a function or is a
            `GlobalContrastiveLoss`, whose running means belong to samples, not to prefixes. Also the errors of the
            loss.
    """
    group, equal_shards = check_group(options.get("group")), options.get("equal_shards", False)
    with reported(group, equal_shards, image_features):
        check_features(image_features, text_features, paired=False, backend=None, may_be_empty=True)
        sizes = _check_prefixes(prefixes)
        if max(sizes) > image_features.shape[1]:
            features = describe("image_features", image_features)
            raise ValueError(f"prefixes must be at most D, got {max(sizes)} for {features}")
        factors = _check_weights(weights, len(sizes))
        function = _check_loss(loss)
        if options.get("reduction") == "none":
            raise ValueError("matryoshka_loss sums over prefixes: reduction must be 'mean' or 'sum', got 'none'")
    if group is not None:  # each prefix is a call of the loss, and ranks with fewer calls would leave others waiting
        agreed = {"function": "matryoshka_loss", "prefixes": sizes, "weights": factors}
        meet(group, image_features, text_features, {}, agreed, equal_shards)
    losses = [
        factor * function(image_features[:, :d], text_features[:, :d], logit_scale, **options)
        for d, factor in zip(sizes, factors)
    ]
    total: Tensor = sum(losses[1:], start=losses[0])
    return total


def _check_prefixes(prefixes: Any) -> tuple[int, ...]:
    """Return the lengths of the prefixes. Raise unless they are distinct positive integers."""
    if not isinstance(prefixes, Iterable):
        raise TypeError(f"prefixes must be several integers, such as (64, 128), got {type(prefixes).__name__}")
    sizes = []
    for d in prefixes:
        if isinstance(d, bool) or not hasattr(d, "__index__"):
            raise TypeError(f"prefixes must be integers, got {type(d).__name__}")
        sizes.append(operator.index(d))
    if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise ValueError(f"prefixes must be distinct integers of at least 1, got {tuple(sizes)}")
    return tuple(sizes)


def _check_loss(loss: Any) -> Callable[..., Any]:
    if isinstance(loss, GlobalContrastiveLoss):
        raise TypeError(
            "loss must not be a GlobalContrastiveLoss: it keeps one running mean per sample, which the prefixes would "
            "mix. Add the losses of one GlobalContrastiveLoss for each prefix"
        )
    if loss is not None and not callable(loss):
        raise TypeError(f"loss must be a function, such as fastclip.sigmoid_loss, got {type(loss).__name__}")
    return contrastive_loss if loss is None else loss


def _check_weights(weights: Iterable[float] | None, count: int) -> Sequence[float]:
    if weights is None:
        return [1.0] * count
    factors = [number(f"weights[{k}]", weight) for k, weight in enumerate(weights)]
    if len(factors) != count or not all(-math.inf < factor < math.inf for factor in factors):
        raise ValueError(f"weights must be one finite number for each of the {count} prefixes, got {factors}")
    return factors
