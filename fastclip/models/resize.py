"""Resize RGB images with native code, which gives the same bits as Pillow in a quarter of the time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fastclip._backends.cpu.native import missing, module

if TYPE_CHECKING:
    from torchvision.transforms import RandomResizedCrop, Resize

__all__ = ["RandomPart", "Resized", "native_resize", "resized"]

logger = logging.getLogger(__name__)

Part = tuple[int, int, int, int]  # x, y, width and height within an image
ColumnsFirst = Callable[[int, int, int, int], bool]  # old width and height, new width and height -> order of the passes

_FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
_NARROWEST = 50  # Pillow 12 resizes images of more than 100 times their width in two calls
# Old and new sizes on both sides of the limit from which Pillow 13 resizes the columns first
_PROBES = ((40, 37, 24, 24), (30, 64, 24, 24), (32, 40, 24, 24), (32, 41, 24, 24), (20, 41, 30, 40), (37, 29, 50, 60))


class RandomPart:
    """torchvision's `RandomResizedCrop`, with the same random draws and the same bits, in less time."""

    def __init__(self, crop: RandomResizedCrop) -> None:
        self.crop, self._resample = crop, _filter(crop)
        native_resize()  # logs here, not in a worker, if there is no native code

    def __call__(self, image: Image.Image) -> Image.Image:
        y, x, height, width = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        return resized(image, (x, y, width, height), self.crop.size[::-1], self._resample)


class Resized:
    """torchvision's `Resize`, with the same bits, in less time."""

    def __init__(self, resize: Resize) -> None:
        self.resize, self._resample = resize, _filter(resize)
        native_resize()

    def __call__(self, image: Image.Image) -> Image.Image:
        size = self.resize.size
        if isinstance(size, int):  # the length of the shorter side
            longer = int(size * max(image.size) / min(image.size))
            width, height = (size, longer) if image.width <= image.height else (longer, size)
        else:
            height, width = size
        return resized(image, (0, 0, *image.size), (width, height), self._resample)


def resized(image: Image.Image, part: Part, size: tuple[int, int], resample: int) -> Image.Image:
    """Return the part of an image, resized as by ``image.crop(...).resize(size, resample)``, with the same bits.

    Pillow resizes what the native code does not support: modes other than RGB, filters other than bilinear and bicubic,
    images smaller than the filter, and images that are too large to lie in one block of memory.

    Args:
        part: x, y, width and height of the part.
        size: new width and height.
        resample: one of Pillow's filters.
    """
    x, y, width, height = part
    columns_first = native_resize()
    if columns_first is not None and image.mode == "RGB" and resample in _FILTERS and height <= _NARROWEST * width:
        try:
            return _native(image, part, size, resample, columns_first(width, height, *size))
        except ValueError:  # what Pillow supports and the native code does not
            pass
    if part != (0, 0, *image.size):
        image = image.crop((x, y, x + width, y + height))
    return image.resize(size, resample)


@cache
def native_resize() -> ColumnsFirst | None:
    """Return the order in which the native code has to resize rows and columns, or None if Pillow must resize.

    The order determines the bits. Pillow 13 resizes the columns first under a condition, and earlier versions never.
    Small images are resized by both, so that another version of Pillow, with other bits, is noticed.
    """
    reason = missing()
    if reason is None and not hasattr(module, "resize"):
        reason = "the native module was built from older sources (install fastclip again)"
    elif reason is None and not hasattr(Image.Image, "__arrow_c_array__"):
        reason = "it needs Pillow 11.2 or newer"
    elif reason is None and module.isa() == "portable":
        reason = "it needs a processor with AVX2"
    if reason is None:
        for columns_first in (_mostly_shorter, _never):
            if _equals_pillow(columns_first):
                return columns_first
        reason = "this version of Pillow has other bits"
    logger.info("Pillow resizes the images, because the faster native code cannot be used: %s", reason)
    return None


def _native(image: Image.Image, part: Part, size: tuple[int, int], resample: int, columns_first: bool) -> Image.Image:
    array: Any = image.__arrow_c_array__()[1]  # the pixels of the image, which are not copied
    cubic = resample == Image.Resampling.BICUBIC
    pixels = module.resize(array, *image.size, part, *size, cubic, columns_first)
    return Image.frombytes("RGB", size, pixels, "raw", "RGBX", 0, 1)


def _mostly_shorter(width: int, height: int, new_width: int, new_height: int) -> bool:
    return new_height < height and height - new_height > 2 * (width - new_width)


def _never(width: int, height: int, new_width: int, new_height: int) -> bool:
    return False


def _equals_pillow(columns_first: ColumnsFirst) -> bool:
    generator = np.random.default_rng(0)
    for width, height, *size in _PROBES:
        image = Image.fromarray(generator.integers(0, 2, (height, width, 3), dtype=np.uint8) * 255)
        for resample in _FILTERS:
            try:
                ours = _native(
                    image, (0, 0, width, height), (size[0], size[1]), resample, columns_first(width, height, *size)
                )
            except ValueError:
                return False
            if ours.tobytes() != image.resize((size[0], size[1]), resample).tobytes():
                return False
    return True


def _filter(step: RandomResizedCrop | Resize) -> int:
    """Return Pillow's number of the filter of a step of torchvision."""
    from torchvision.transforms.functional import pil_modes_mapping

    return int(pil_modes_mapping[step.interpolation])
