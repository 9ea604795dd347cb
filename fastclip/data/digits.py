"""Handwritten digits with captions: 1,797 real images that come with scikit-learn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits as load_sklearn_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from fastclip.data.batch import Batch

__all__ = ["CLASS_NAMES", "TEMPLATES", "Digits", "digit_batches", "load_digits"]

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
    train, held_out = train_test_split(range(len(labels)), test_size=0.2, stratify=targets, random_state=_SPLIT_SEED)
    return Digits(images[train], labels[train]), Digits(images[held_out], labels[held_out])


def digit_batches(
    digits: Digits, tokenize: Callable[[list[str]], Tensor], *, batch_size: int, seed: int
) -> Iterator[Batch]:
    """Endless batches, epoch after epoch in a new order; each image slightly moved, with a caption chosen at random.

    A caption is labelled with its digit, so that it belongs to every image of that digit in the batch. All choices are
    functions of ``seed`` alone. An epoch's last images that do not fill a batch are left out.

    Args:
        tokenize: B texts -> token ids (B, L).
        batch_size: M = N, at most the number of images.
    """
    if not 0 < batch_size <= len(digits.labels):
        raise ValueError(f"batch_size must be between 1 and {len(digits.labels)} images, got {batch_size}")
    captions = [template.format(name) for name in CLASS_NAMES for template in TEMPLATES]
    ids = tokenize(captions).view(len(CLASS_NAMES), len(TEMPLATES), -1)
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(digits.labels), generator=generator)
        for chosen in order.split(batch_size):
            if len(chosen) == batch_size:
                labels = digits.labels[chosen]
                template = torch.randint(len(TEMPLATES), (batch_size,), generator=generator)
                images = _jitter(digits.images[chosen], generator)
                yield Batch(images, ids[labels, template], labels, labels)


def _jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """images (B, C, H, W) turned by up to 11 degrees, zoomed by up to 10 % and shifted by up to 5 % of their size."""
    turn, zoom, right, down = 2 * torch.rand(4, len(images), generator=generator) - 1
    turn, zoom = 0.2 * turn, 1 + 0.1 * zoom
    cos, sin = zoom * turn.cos(), zoom * turn.sin()
    rows = torch.stack([cos, -sin, 0.1 * right, sin, cos, 0.1 * down], dim=1)  # units: half the size of an image
    grid = F.affine_grid(rows.view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
