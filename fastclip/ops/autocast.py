"""The losses under torch.autocast: features are cast to its dtype, scale and bias stay in fp32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["autocast_dtype", "autocast_features", "autocasts", "no_autocast", "without_autocast"]

_Result = TypeVar("_Result")


def without_autocast(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Wrap the implementation of an op to run without autocast, which would round its fp32 products."""

    @functools.wraps(function)
    def wrapped(image: Tensor, *args: Any, **options: Any) -> _Result:
        if not autocasts(image.device):
            return function(image, *args, **options)
        with no_autocast(image.device):
            return function(image, *args, **options)

    return wrapped


def autocasts(device: torch.device) -> bool:
    """Return True if torch.autocast is enabled. The result is False for unsupported devices such as meta."""
    known = device.type in ("cpu", "cuda") or torch.amp.is_autocast_available(device.type)
    return known and torch.is_autocast_enabled(device.type)


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which operations keep the dtypes of their inputs."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype to which torch.autocast, if enabled, casts `x`. As in torch's ops, fp64 is not cast."""
    if x.dtype == torch.float64 or not autocasts(x.device):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def autocast_features(image: Tensor, text: Tensor, *scalars: Tensor) -> tuple[Tensor, ...]:
    """Return both features in autocast's dtype, and the scalars in fp32 (fp64 for fp64 features)."""
    image, text = image.to(autocast_dtype(image)), text.to(autocast_dtype(text))
    return image, text, *(x.to(torch.promote_types(image.dtype, torch.float32)) for x in scalars)
