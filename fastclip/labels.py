"""Labels as the kernels want them: small numbers, and how many positives each row has."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MatchedLabels", "match_labels"]


class MatchedLabels(NamedTuple):
    ids: tuple[Tensor, Tensor]  # (M,), (N,) int32; equal where the labels are equal
    image_count: Tensor  # (M,) int64: texts with the image's label
    text_count: Tensor  # (N,) int64: images with the text's label


def match_labels(image_labels: Tensor, text_labels: Tensor) -> MatchedLabels:
    """Integer labels (M,) and (N,) -> ids and counts, by sorting: no M x N comparison, no data-dependent shape.

    A label's id is its first place among the sorted text labels; image labels that no text has share the id -1.
    """
    image_labels, text_labels = image_labels.long(), text_labels.long()
    sorted_images, sorted_texts = image_labels.sort().values, text_labels.sort().values

    def count(labels: Tensor, among: Tensor) -> Tensor:
        return torch.searchsorted(among, labels, right=True) - torch.searchsorted(among, labels)

    image_count, text_count = count(image_labels, sorted_texts), count(text_labels, sorted_images)
    image_id = torch.where(image_count > 0, torch.searchsorted(sorted_texts, image_labels), -1)
    text_id = torch.searchsorted(sorted_texts, text_labels)
    return MatchedLabels((image_id.int(), text_id.int()), image_count, text_count)
