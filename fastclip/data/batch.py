"""What a training step is fed."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastclip.data.faults import Fault

__all__ = ["Batch"]


class Batch(NamedTuple):
    """B pictures, each with one of its captions; every picture and caption of equal labels belong together."""

    images: Tensor  # (B, 3, H, W) float32
    ids: Tensor  # (B, L) int64, token ids
    labels: Tensor  # (B,) int64, not negative
    keys: tuple[str, ...]  # B of them, what messages call the samples
    skipped: tuple[Fault, ...] = ()  # of the samples that could not be used, in whose places are others
