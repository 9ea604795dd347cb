"""The batch that a training step consumes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastclip.data.faults import Fault

__all__ = ["Batch"]


class Batch(NamedTuple):
    """B images, each with one of its captions. Images and captions with equal labels are positives of each other."""

    images: Tensor  # (B, 3, H, W), uint8 pixels or normalised float32
    ids: Tensor  # (B, L) int64, token ids
    labels: Tensor  # (B,) int64, not negative
    keys: tuple[str, ...]  # (B,) names by which messages refer to the samples
    skipped: tuple[Fault, ...] = ()  # samples that could not be used and were replaced by others
    samples: Tensor = torch.empty(0, dtype=torch.int64)  # (B,) int64, `sample_position` of the samples; may be missing
