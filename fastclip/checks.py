"""Arguments that do not fit become errors here, before any work: each names both tensors with shape and dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from fastclip import _env
from fastclip._backends import check_name, pick
from fastclip.ops import autocast_dtype

__all__ = ["check_backend", "check_features", "check_labels", "check_reduction", "check_share", "describe", "scalar"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(name: str, x: Tensor) -> str:
    return f"{name} {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"


def check_features(
    image: Tensor, text: Tensor, *, paired: bool, backend: str | None, may_be_empty: bool = False
) -> None:
    """Two matrices of one floating dtype, device and D; when `paired`, with as many rows; a shard `may_be_empty`."""
    check_name(backend)
    for name, x in (("image_features", image), ("text_features", text)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")

    def both() -> str:  # only for errors: under torch.compile the shapes may be symbols
        return f"{describe('image_features', image)} and {describe('text_features', text)}"

    if not (image.is_floating_point() and text.is_floating_point()):
        raise TypeError(f"features must be floating tensors: {both()}")
    if image.dtype not in _DTYPES or text.dtype not in _DTYPES:
        raise TypeError(f"features must be float32, bfloat16, float16 or float64: {both()}")
    if image.dtype != text.dtype and autocast_dtype(image) != autocast_dtype(text):
        raise TypeError(f"features must have one dtype: {both()}")
    if image.device != text.device:
        raise ValueError(f"features must be on one device: {both()}")
    if image.dim() != 2 or text.dim() != 2:
        raise ValueError(f"features must be matrices (batch, D): {both()}")
    if image.shape[1] != text.shape[1]:
        raise ValueError(f"features must have the same D: {both()}")
    if image.shape[1] == 0 or (not may_be_empty and (image.shape[0] == 0 or text.shape[0] == 0)):
        raise ValueError(f"features must not be empty: {both()}")
    if paired and image.shape[0] != text.shape[0]:
        raise ValueError(f"there must be as many texts as images: {both()}")


def check_labels(
    image: Tensor, text: Tensor, image_labels: Tensor | None, text_labels: Tensor | None, exclude_self: bool
) -> None:
    if image_labels is None and text_labels is None:
        if exclude_self:
            raise ValueError("exclude_self needs labels: without them the own pair is the only positive")
        return
    if image_labels is None or text_labels is None:
        missing = "image_labels" if image_labels is None else "text_labels"
        raise ValueError(f"{missing} is missing: give image_labels and text_labels, or neither")
    for side, x, labels in (("image", image, image_labels), ("text", text, text_labels)):
        if not isinstance(labels, Tensor):
            raise TypeError(f"{side}_labels must be a torch.Tensor, got {type(labels).__name__}")
        if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            raise TypeError(f"{side}_labels must be integers: {describe(side + '_labels', labels)}")
        if labels.dim() != 1 or labels.shape[0] != x.shape[0] or labels.device != x.device:
            raise ValueError(
                f"{side}_labels must hold one label a row: {describe(side + '_labels', labels)} for "
                f"{describe(side + '_features', x)}"
            )


def check_share(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def check_reduction(reduction: str, allowed: tuple[str, ...]) -> None:
    if reduction not in allowed:
        names = f"{', '.join(map(repr, allowed[:-1]))} or {allowed[-1]!r}"
        raise ValueError(f"reduction must be {names}, got {reduction!r}")


def check_backend(backend: str | None, image: Tensor) -> None:
    """What a backend would raise: RuntimeError where an explicit one cannot serve features like `image`, ValueError for
    a workspace that is no number."""
    pick(backend, image)
    _env.workspace_bytes()


def scalar(name: str, value: float | Tensor, image: Tensor) -> Tensor:
    """`value`, a number or a tensor of one element, as a tensor () beside `image`: fp32, for fp64 features fp64."""
    dtype = torch.promote_types(image.dtype, torch.float32)
    if not isinstance(value, Tensor):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number or a torch.Tensor, got {type(value).__name__}")
        return torch.full((), value, dtype=dtype, device=image.device)
    if value.is_complex():
        raise TypeError(f"{name} must be real: {describe(name, value)}")
    if value.numel() != 1:
        raise ValueError(f"{name} must have one element: {describe(name, value)}")
    return (value.reshape(()) if value.dim() else value).to(device=image.device, dtype=dtype)
