"""The losses of `fastclip train` by name, each with the options and the temperature of the paper that introduced it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fastclip.losses.contrastive import contrastive_loss
from fastclip.losses.global_contrastive import GlobalContrastiveLoss
from fastclip.losses.matryoshka import matryoshka_loss
from fastclip.losses.sigmoid import sigmoid_loss

__all__ = ["NamedLoss", "cosine_gamma", "named_loss"]


class NamedLoss(NamedTuple):
    """A loss over the batch of all processes, and the initial values that it needs in the model."""

    function: Callable[..., Tensor]  # (image features, text features, labels or samples, scale[, bias]) -> ()
    init_logit_scale: float | None  # logarithm of the scale; None keeps the model's default
    init_logit_bias: float | None  # None: the loss has no bias
    fixed_scale: bool  # the scale is not trained
    with_labels: bool  # repeats of a pair are positives, not negatives
    module: GlobalContrastiveLoss | None = None  # state of `function`, which then takes samples in place of labels


def named_loss(
    name: str,
    *,
    label_smoothing: float = 0.0,
    image_weight: float | None = None,
    prefixes: Sequence[int] | None = None,
    group: Any = None,
    comm: str = "gather",
    equal_shards: bool = False,
    backend: str | None = None,
    samples: int | None = None,
    rho: float | None = None,
    temperature: float | None = None,
) -> NamedLoss:
    """Return the loss with the given name.

    Args:
        name: "clip", "unicl", "align", "convirt", "siglip" or "global".
        label_smoothing, image_weight, group, comm, equal_shards, backend: arguments of `fastclip.contrastive_loss`. An
            image_weight of None means 0.75 for convirt and 0.5 otherwise. The siglip and global losses have neither
            label_smoothing nor image_weight.
        prefixes: lengths of prefixes of the features, over whose losses the loss is then the sum
            (`fastclip.matryoshka_loss`). The global loss has none.
        samples, rho: arguments of `fastclip.GlobalContrastiveLoss`, for the global loss only.
        temperature: fixed temperature of the global loss (default: it is trained).

    Raises:
        ValueError: the name is unknown, or the siglip or global loss is given an option that it does not have.
    """
    shared: dict[str, Any] = {"group": group, "comm": comm, "equal_shards": equal_shards, "backend": backend}

    def total(function: Callable[..., Any], image: Tensor, text: Tensor, scale: Tensor, **options: Any) -> Tensor:
        options |= shared
        if prefixes is not None:
            return matryoshka_loss(image, text, scale, prefixes=prefixes, loss=function, **options)
        value: Tensor = function(image, text, scale, **options)
        return value

    def contrastive(image: Tensor, text: Tensor, labels: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        pairs: dict[str, Any] = {"image_labels": labels, "text_labels": labels} if name == "unicl" else {}
        weight = (0.75 if name == "convirt" else 0.5) if image_weight is None else image_weight
        options = {"label_smoothing": label_smoothing, "image_weight": weight, **pairs}
        value = total(contrastive_loss, image, text, scale, **options)
        return 2 * value if name == "align" else value  # Jia et al. 2021, equations 1 and 2: the sum of both directions

    def sigmoid(image: Tensor, text: Tensor, labels: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return total(sigmoid_loss, image, text, scale, logit_bias=bias)

    if name in ("siglip", "global") and (label_smoothing or image_weight is not None):
        raise ValueError(f"the {name} loss has no {'label smoothing' if label_smoothing else 'image_weight'}")
    if name == "global" and prefixes is not None:
        raise ValueError("the global loss has no prefixes: its running means belong to samples, not to prefixes")
    if name == "global":
        module = GlobalContrastiveLoss(samples, rho=rho, **shared)  # type: ignore[arg-type]  # checks `samples`

        def of_dataset(image: Tensor, text: Tensor, index: Tensor, scale: Tensor, bias: Any = None) -> Tensor:
            return module(image, text, scale, index)

        start = None if temperature is None else -math.log(temperature)
        return NamedLoss(of_dataset, start, None, temperature is not None, with_labels=False, module=module)
    if name == "siglip":  # Zhai et al. 2023, section 3.2
        return NamedLoss(sigmoid, math.log(10), -10.0, fixed_scale=False, with_labels=False)
    if name == "convirt":  # Zhang et al. 2020: temperature 0.1, not learned
        return NamedLoss(contrastive, math.log(10), None, fixed_scale=True, with_labels=False)
    if name not in ("clip", "unicl", "align"):
        raise ValueError(f"unknown loss {name!r}: choose clip, unicl, align, convirt, siglip or global")
    # Jia et al. 2021, section 5.1: the temperature starts at 1
    start = 0.0 if name == "align" else None
    return NamedLoss(contrastive, start, None, fixed_scale=False, with_labels=name == "unicl")


def cosine_gamma(epoch: int, epochs: float, least: float) -> float:
    """Return the gamma of the global loss in an epoch, counted from 0 (Wei et al. 2024).

    It falls from 1 to `least` along half a cosine, an epoch at a time, and stays there from epoch `epochs` on.
    """
    if epoch >= epochs:
        return least
    return 0.5 * (1 + math.cos(math.pi * epoch / epochs)) * (1 - least) + least
