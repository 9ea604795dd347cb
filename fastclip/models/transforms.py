"""Transforms from images to the image tower's input, with torchvision. For CLIP models, they equal open_clip's.

A transform ends in the normalisation of its uint8 pixels. `split_normalization` separates the two, so that data workers
hand over a quarter of the bytes and the model's device normalises a whole batch, with the same result bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from fastclip.data.picture import eight_bits
from fastclip.models.config import ModelConfig
from fastclip.models.resize import RandomPart, Resized

if TYPE_CHECKING:
    from torchvision.transforms import Compose

__all__ = ["PixelNormalization", "image_transform", "pixel_transform", "split_normalization", "training_side"]

_AREA = (0.9, 1.0)  # share of the image's area that open_clip's random crop takes


@dataclass(frozen=True)
class PixelNormalization:
    """Normalisation of uint8 pixels (..., 3, H, W) to float32: divide by 255, subtract `mean`, divide by `std`.

    On a CPU, the result equals that of torchvision's ToTensor and Normalize bit for bit. Floating-point images are
    returned as they are, because a transform has normalised them already.

    Args:
        mean: mean of each channel, on a scale from 0 to 1.
        std: standard deviation of each channel.

    Raises:
        TypeError: the pixels are neither uint8 nor floating-point numbers.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    _constants: dict[torch.device, tuple[Tensor, ...]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, config: ModelConfig) -> PixelNormalization:
        """Return the normalisation of a model."""
        options = config.preprocess_cfg
        return cls(tuple(options.mean), tuple(options.std))

    def __call__(self, pixels: Tensor) -> Tensor:
        if pixels.is_floating_point():
            return pixels
        if pixels.dtype != torch.uint8:
            raise TypeError(f"images must be uint8 or floating-point, got {pixels.dtype}")
        full, mean, std = self._on(pixels.device)
        return pixels.to(torch.float32).div_(full).sub_(mean).div_(std)

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return 255, the means and the standard deviations as tensors on a device.

        CUDA multiplies by the reciprocal of a Python number or a CPU scalar, which may change the last bit. Copying the
        tensors to a GPU once, not for each batch, spares the host a wait.
        """
        if device not in self._constants:
            values = (255.0,), self.mean, self.std
            self._constants[device] = tuple(
                torch.tensor(x, dtype=torch.float32, device=device).view(-1, 1, 1) for x in values
            )
        return self._constants[device]


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
    from torchvision.transforms import Compose

    return Compose([*pixel_transform(config, train=train).transforms, PixelNormalization.of(config)])


def pixel_transform(config: ModelConfig, *, train: bool = False) -> Compose:
    """Return the `image_transform` of a model without its normalisation: uint8 pixels (3, S, S), with the same crops.

    The arguments and errors are those of `image_transform`. `PixelNormalization.of` returns the other part.
    """
    from torchvision.transforms import (  # imports torch._dynamo, which takes a second
        CenterCrop,
        Compose,
        InterpolationMode,
        RandomCrop,
        RandomHorizontalFlip,
        RandomResizedCrop,
        Resize,
    )

    options, size = config.preprocess_cfg, config.vision_cfg.image_size
    interpolation = InterpolationMode(options.interpolation)
    resize_size = options.resize_size or size
    if resize_size < size:
        raise ValueError(f"resize_size must be at least image_size {size}, got {resize_size}")
    sides = resize_size if options.resize_mode == "shortest" else (resize_size, resize_size)
    resize = Resized(Resize(sides, interpolation))
    if not train:
        crops = [resize, CenterCrop(size)]
    elif options.train_crop == "resized":
        crops = [RandomPart(RandomResizedCrop(size, scale=_AREA, interpolation=interpolation))]
    else:
        crops = [resize, RandomCrop(size), RandomHorizontalFlip()]
    return Compose([_checked, *crops, _to_rgb, _to_tensor])


def split_normalization(
    transform: Callable[[Image.Image], Tensor],
) -> tuple[Callable[[Image.Image], Tensor], Callable[[Tensor], Tensor]]:
    """Split a transform into the part for data workers and the part for the model's device.

    Args:
        transform: any image transform.

    Returns:
        For a result of `image_transform`, the transform to uint8 pixels and its `PixelNormalization`. Any other
        transform is returned whole, with a function that returns its input.
    """
    steps = getattr(transform, "transforms", ())
    if not steps or not isinstance(steps[-1], PixelNormalization):
        return transform, _same
    from torchvision.transforms import Compose

    return Compose(steps[:-1]), steps[-1]


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


def _to_tensor(image: Image.Image) -> Tensor:
    # Contiguous, because a batch of strided images would be in channels-last order, which may change a model's bits.
    # Pillow separates the channels three times as fast as torch
    planes = bytearray().join(band.tobytes() for band in image.split())
    return torch.frombuffer(planes, dtype=torch.uint8).view(3, image.height, image.width)


def _same(images: Tensor) -> Tensor:
    return images
