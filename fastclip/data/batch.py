"""The batch that a training step takes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastclip.data.faults import Fault

__all__ = ["Batch"]


class Batch(NamedTuple):
    """B pictures, each with one of its captions; pictures and captions with equal labels belong together."""

    images: Tensor  # (B, 3, H, W) float32
    ids: Tensor  # (B, L) int64, token ids
    labels: Tensor  # (B,) int64, not negative
    keys: tuple[str, ...]  # (B,) names of the samples in messages
    skipped: tuple[Fault, ...] = ()  # samples that could not be used; others stand in their places
