"""What a training step is fed."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Batch"]


class Batch(NamedTuple):
    """Images and texts, each with a label; every image and text of equal labels belong together."""

    images: Tensor  # (M, C, H, W) float32
    ids: Tensor  # (N, L) int64, token ids
    image_labels: Tensor  # (M,) int64
    text_labels: Tensor  # (N,) int64
