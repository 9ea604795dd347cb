"""Handwritten digits with captions: 1,797 real images that come with scikit-learn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from fastclip.data.source import Record

__all__ = ["CLASS_NAMES", "TEMPLATES", "DigitsSource"]

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a handwritten {}",
    "a photo of a handwritten {}",
    "the digit {} written by hand",
    "a small grey scan of the number {}",
    "someone wrote a {}",
)

_SPLIT_SEED = 0


class DigitsSource:
    """The digits as RGB images of 32 x 32 pixels, white on black, each with five captions from `TEMPLATES`.

    The original 8 x 8 images with 17 grey levels are enlarged. Source: the test set of UCI "Optical Recognition of
    Handwritten Digits" (Alpaydin and Kaynak 1998), as in ``sklearn.datasets.load_digits``.

    Args:
        held_out: open the held-out fifth (360 images) in place of the training images (1,437). The split is fixed, and
            every digit has the same share in both parts.
    """

    spec = "digits"
    class_names: tuple[str, ...] = CLASS_NAMES
    templates: tuple[str, ...] = TEMPLATES

    def __init__(self, *, held_out: bool = False) -> None:
        pixels, targets = load_digits(return_X_y=True)
        every = range(len(targets))
        training, held = train_test_split(every, test_size=0.2, stratify=targets, random_state=_SPLIT_SEED)
        self._numbers: list[int] = held if held_out else training
        small = torch.from_numpy(pixels[self._numbers]).float().reshape(-1, 1, 8, 8) / 16  # levels are 0 to 16
        large = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)[:, 0]
        self._pixels = (255 * large).round().to(torch.uint8).numpy()  # (B, 32, 32)
        self._labels: list[int] = targets[self._numbers].tolist()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Record:
        image = Image.fromarray(self._pixels[index]).convert("RGB")
        return Record(image, self.captions(index), self.key(index), self._labels[index])

    def captions(self, index: int) -> tuple[str, ...]:
        return tuple(template.format(CLASS_NAMES[self._labels[index]]) for template in TEMPLATES)

    def key(self, index: int) -> str:
        return f"digits/{self._numbers[index]:04d}"
