"""Handwritten digits with captions: 1,797 real images that come with scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits as load_sklearn_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from fastclip.data.source import Record

__all__ = ["CLASS_NAMES", "TEMPLATES", "Digits", "DigitsSource", "load_digits"]

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a handwritten {}",
    "a photo of a handwritten {}",
    "the digit {} written by hand",
    "a small grey scan of the number {}",
    "someone wrote a {}",
)

_SPLIT_SEED = 0


class Digits(NamedTuple):
    images: Tensor  # (B, 3, 32, 32) float32 in [-1, 1], white ink, three equal channels
    labels: Tensor  # (B,) int64, 0 to 9


def load_digits() -> tuple[Digits, Digits]:
    """Training images (1,437) and a held-out fifth (360), with every digit's share alike in both; always the same.

    The 8 x 8 images of 17 grey levels are enlarged to 32 x 32. Source: UCI "Optical Recognition of Handwritten
    Digits" (Alpaydin and Kaynak 1998), its test set, as in ``sklearn.datasets.load_digits``.
    """
    pixels, targets = load_sklearn_digits(return_X_y=True)
    small = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1  # levels are 0 to 16
    images = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(targets).long()
    train, held_out = _split(targets)
    return Digits(images[train], labels[train]), Digits(images[held_out], labels[held_out])


class DigitsSource:
    """The digits as RGB pictures of 32 x 32 pixels, each with the five templates' captions of its digit.

    Args:
        held_out: the held-out fifth in place of the training images; both are `load_digits`'s, in its order.
    """

    spec = "digits"
    class_names: tuple[str, ...] = CLASS_NAMES
    templates: tuple[str, ...] = TEMPLATES

    def __init__(self, *, held_out: bool = False) -> None:
        digits = load_digits()[held_out]
        _, targets = load_sklearn_digits(return_X_y=True)
        self._numbers = _split(targets)[held_out]
        self._pixels = ((digits.images[:, 0] + 1) * 127.5).round().to(torch.uint8).numpy()  # (B, 32, 32)
        self._labels = digits.labels.tolist()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Record:
        image = Image.fromarray(self._pixels[index]).convert("RGB")
        return Record(image, self.captions(index), f"digits/{self._numbers[index]:04d}", self._labels[index])

    def captions(self, index: int) -> tuple[str, ...]:
        return tuple(template.format(CLASS_NAMES[self._labels[index]]) for template in TEMPLATES)


def _split(targets: Sequence[int]) -> tuple[list[int], list[int]]:
    """Numbers of the training images and of the held-out ones, in the order in which they are given out."""
    train, held_out = train_test_split(range(len(targets)), test_size=0.2, stratify=targets, random_state=_SPLIT_SEED)
    return train, held_out
