"""Pictures to the image tower's input, with torchvision; CLIP's are open_clip's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from PIL import Image

from fastclip.data.picture import eight_bits
from fastclip.models.config import ModelConfig

if TYPE_CHECKING:
    from torchvision.transforms import Compose

__all__ = ["image_transform", "training_side"]

_AREA = (0.9, 1.0)  # of open_clip's random part


def image_transform(config: ModelConfig, *, train: bool = False) -> Compose:
    """PIL image of any mode -> (3, S, S) float32, normalised. Of more than 8 bits a channel none are cut off.

    For evaluation the image is resized, CLIP's by its shorter side and ALIGN's to a square, and the centre cropped. For
    training CLIP takes a random part of 90 to 100 % of the area (open_clip's), ALIGN a random crop of the resized
    image, mirrored or not (Jia et al. 2021, section 5.1).
    """
    from torchvision.transforms import (  # loads torch._dynamo, a second's work
        CenterCrop,
        Compose,
        InterpolationMode,
        Normalize,
        RandomCrop,
        RandomHorizontalFlip,
        RandomResizedCrop,
        Resize,
        ToTensor,
    )

    options, size = config.preprocess_cfg, config.vision_cfg.image_size
    interpolation = InterpolationMode(options.interpolation)
    resize_size = options.resize_size or size
    if resize_size < size:
        raise ValueError(f"resize_size {resize_size} is under image_size {size}")
    resize = Resize(resize_size if options.resize_mode == "shortest" else (resize_size, resize_size), interpolation)
    if not train:
        crops = [resize, CenterCrop(size)]
    elif options.train_crop == "resized":
        crops = [RandomResizedCrop(size, scale=_AREA, interpolation=interpolation)]
    else:
        crops = [resize, RandomCrop(size), RandomHorizontalFlip()]
    return Compose([_checked, *crops, _to_rgb, ToTensor(), Normalize(options.mean, options.std)])


def training_side(config: ModelConfig) -> int:
    """Return the pixels of a picture's shorter side that training takes: with so many, no crop of it is enlarged."""
    options, size = config.preprocess_cfg, config.vision_cfg.image_size
    if options.train_crop == "resized":
        return math.ceil(size / _AREA[0])  # a part inside the picture keeps so much of either side
    return options.resize_size or size


def _checked(image: Image.Image) -> Image.Image:
    if not isinstance(image, Image.Image):
        raise TypeError(f"the transform takes a picture of PIL, got {type(image).__name__}")
    if not all(image.size):
        raise ValueError(f"a picture of {image.width} x {image.height} pixels shows nothing")
    return eight_bits(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")  # after the crop: fewer pixels to convert
