"""The contrastive loss over more than two views."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastclip.distributed import check_group, reported
from fastclip.losses.contrastive import contrastive_loss
from fastclip.losses.inputs.arguments import describe

__all__ = ["multiview_loss"]


def multiview_loss(
    views: Iterable[Tensor] | Tensor,
    logit_scale: float | Tensor = 1 / 0.07,
    *,
    core: int | None = None,
    labels: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Compute the sum of `contrastive_loss` over pairs of views, not divided by the number of pairs.

    By default these are all pairs (i, j) with i < j, the full graph of CMC (Tian et al. 2020, section 3.2). If ``core``
    is given, they are the pairs of the core view with each other view, CMC's core-view paradigm.

    Args:
        views: two or more feature matrices (N, D) of one dtype and device, as any iterable or as one tensor (V, N, D).
            Row i of every view belongs to the same sample.
        logit_scale: as in `contrastive_loss`.
        core: index of the core view, which is passed as the images of every pair.
        labels: integers (N,), shared by all views. Every pair with equal labels is a positive.
        options: options of `contrastive_loss`: ``normalize``, ``ignore_label``, ``image_weight``, ``label_smoothing``,
            ``negative_margin``, ``reduction`` ("mean" or "sum"), ``group``, ``comm``, ``equal_shards``, ``backend``.

    Returns:
        A scalar, float32, or float64 for float64 features.

    Raises:
        ValueError: there are fewer than two views, their shapes differ, or the core view does not exist. Also the
            errors of `contrastive_loss`.
        TypeError: a view is not a tensor. Also the errors of `contrastive_loss`.
    """
    group, equal_shards = check_group(options.get("group")), options.get("equal_shards", False)
    with reported(group, equal_shards, views if isinstance(views, Tensor) else None):
        views = views if isinstance(views, (Tensor, Mapping)) else _listed(views)
    first = views if isinstance(views, Tensor) else next(iter(views), None)
    with reported(group, equal_shards, first):
        features = _check_views(views)
        pairs = _pairs(len(features), core, options)
    losses = [
        contrastive_loss(features[i], features[j], logit_scale, image_labels=labels, text_labels=labels, **options)
        for i, j in pairs
    ]
    total: Tensor = torch.stack(losses).sum()  # type: ignore[arg-type]
    return total


def _listed(views: Any) -> Any:
    """Return the views of any iterable as a list, because a generator yields them only once."""
    if not isinstance(views, Iterable):
        return [views]  # `_check_views` refuses it
    return list(views)


def _check_views(views: Any) -> Sequence[Tensor]:
    if isinstance(views, Mapping):
        raise TypeError(f"views must be an iterable of feature tensors, got {type(views).__name__}: pass its values()")
    if isinstance(views, Tensor):
        if views.dim() != 3:
            raise ValueError(f"one tensor of views must be (V, N, D): {describe('views', views)}")
        views = views.unbind(0)
    for k, x in enumerate(views):
        if not isinstance(x, Tensor):
            raise TypeError(f"views[{k}] must be a torch.Tensor, got {type(x).__name__}")
        if x.shape != views[0].shape or x.dtype != views[0].dtype or x.device != views[0].device:
            both = f"{describe('views[0]', views[0])} and {describe(f'views[{k}]', x)}"
            raise ValueError(f"views must have one shape, dtype and device: {both}")
    if len(views) < 2:
        raise ValueError(f"multiview_loss needs at least two views, got {len(views)}")
    return views


def _pairs(count: int, core: int | None, options: dict[str, Any]) -> list[tuple[int, int]]:
    """Return the index pairs of `count` views. Raise if an option does not apply to several views."""
    for name in ("image_labels", "text_labels", "exclude_self"):
        if name in options:
            raise TypeError(f"multiview_loss takes labels=, one label per row shared by all views, not {name}=")
    if options.get("reduction") == "none":
        raise ValueError("multiview_loss sums over views: reduction must be 'mean' or 'sum', got 'none'")
    if core is None:
        return [(i, j) for i in range(count) for j in range(i + 1, count)]
    core = operator.index(core)
    if not 0 <= core < count:
        raise ValueError(f"core must be the index of one of {count} views, got {core}")
    return [(core, j) for j in range(count) if j != core]
