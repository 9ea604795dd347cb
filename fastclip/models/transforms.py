"""Transforms from images to the image tower's input, with torchvision. For CLIP models, they equal open_clip's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from PIL import Image

from fastclip.data.picture import eight_bits
from fastclip.models.config import ModelConfig

if TYPE_CHECKING:
    from torchvision.transforms import Compose

__all__ = ["image_transform", "training_side"]

_AREA = (0.9, 1.0)  # share of the image's area that open_clip's random crop takes


def image_transform(config: ModelConfig, *, train: bool = False) -> Compose:
    """Return the transform of a model, from a PIL image of any mode to a normalised float32 tensor (3, S, S).

    Images with more than 8 bits per channel are scaled to 8 bits, not clipped. For evaluation, the image is resized
    (CLIP: its shorter side; ALIGN: to a square) and cropped at the centre. For training, CLIP takes a random part of
    90 to 100 % of the area, like open_clip, and ALIGN a random crop of the resized image, mirrored with probability
    1/2 (Jia et al. 2021, section 5.1).

    Args:
        config: configuration of the model.
        train: return the transform for training.

    Raises:
        ValueError: the configuration's resize_size is less than its image_size.
    """
    from torchvision.transforms import (  # imports torch._dynamo, which takes a second
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
        raise ValueError(f"resize_size must be at least image_size {size}, got {resize_size}")
    resize = Resize(resize_size if options.resize_mode == "shortest" else (resize_size, resize_size), interpolation)
    if not train:
        crops = [resize, CenterCrop(size)]
    elif options.train_crop == "resized":
        crops = [RandomResizedCrop(size, scale=_AREA, interpolation=interpolation)]
    else:
        crops = [resize, RandomCrop(size), RandomHorizontalFlip()]
    return Compose([_checked, *crops, _to_rgb, ToTensor(), Normalize(options.mean, options.std)])


def training_side(config: ModelConfig) -> int:
    """Return the shorter side in pixels that training images need, so that no random crop has to be enlarged."""
    options, size = config.preprocess_cfg, config.vision_cfg.image_size
    if options.train_crop == "resized":
        return math.ceil(size / _AREA[0])  # a crop of 90 % of the area keeps at least 90 % of either side
    return options.resize_size or size


def _checked(image: Image.Image) -> Image.Image:
    if not isinstance(image, Image.Image):
        raise TypeError(f"the transform takes a PIL image, got {type(image).__name__}")
    if not all(image.size):
        raise ValueError(f"an image of {image.width} x {image.height} pixels is empty")
    return eight_bits(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")  # after the crop: fewer pixels to convert
