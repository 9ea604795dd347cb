"""Checks of the losses' arguments, made before any work. Errors name the tensors with shape, dtype and device."""

from __future__ import annotations

import numbers
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor

from fastclip._backends import DTYPES, FUSED_DTYPES, check_name, pick
from fastclip.ops import TENSORS, autocast_dtype, autocast_features, autocasts, recorded, transformed
from fastclip.system import env

__all__ = [
    "can_be_read",
    "check_features",
    "check_labels",
    "check_reduction",
    "check_shard",
    "check_share",
    "describe",
    "flag",
    "number",
    "plain_problem",
    "scalar",
]

_INTEGERS = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")


def describe(name: str, x: Tensor) -> str:
    return f"{name} {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"


def check_features(
    image: Tensor,
    text: Tensor,
    *,
    paired: bool,
    backend: str | None,
    may_be_empty: bool = False,
    names: tuple[str, str] = ("image_features", "text_features"),
) -> None:
    """Raise unless the features are two matrices of the same floating dtype, device and D.

    paired: both must have the same number of rows. may_be_empty: a shard of a batch may have no rows. names: those of
    the arguments, for messages.
    """
    check_name(backend)
    for name, x in zip(names, (image, text)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if type(x).__name__ == "DTensor":
            raise TypeError(
                f"{name} must be a plain tensor, got a DTensor: pass {name}.to_local(), and the process group of its "
                f"mesh as group="
            )
        if x.layout != torch.strided or x.is_nested:
            layout = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
            raise TypeError(f"{name} must be a dense tensor, got a {layout} one: pass {name}.to_dense()")

    def both() -> str:  # called for errors only: under torch.compile, shapes may be symbolic
        return f"{describe(names[0], image)} and {describe(names[1], text)}"

    if not (image.is_floating_point() and text.is_floating_point()):
        raise TypeError(f"features must be floating tensors: {both()}")
    if image.dtype not in DTYPES or text.dtype not in DTYPES:
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


def plain_problem(image: Any, text: Any, logit_scale: Any, logit_bias: Any = None) -> tuple[Tensor, ...] | None:
    """Return paired features (N, D) and scalars in the form that the ops take, or None if they need the full checks.

    None is returned for anything unusual: invalid arguments, tensor subclasses, torch.func transforms. These few tests
    take a tenth of the time of the full checks, which would limit the speed of a step with few rows.
    """
    if (
        type(image) not in TENSORS
        or type(text) not in TENSORS
        or image.is_nested
        or text.is_nested
        or image.dtype not in FUSED_DTYPES
        or text.dtype not in FUSED_DTYPES
        or not image.layout == text.layout == torch.strided
        or image.device != text.device
        or image.device.type not in ("cpu", "cuda")
        or image.ndim != 2
        or image.shape != text.shape
        or 0 in image.shape
        or transformed(image, text, logit_scale, logit_bias)
    ):
        return None
    autocast = autocasts(image.device)
    if image.dtype != text.dtype and not autocast:
        return None
    problem: tuple[Tensor, ...] = image, text, scalar("logit_scale", logit_scale, image)
    if logit_bias is not None:
        problem += (scalar("logit_bias", logit_bias, image),)
    if type(problem[-1]) not in TENSORS or type(problem[2]) not in TENSORS:
        return None
    if autocast:
        problem = autocast_features(*problem)
    return problem if problem[0].dtype == problem[1].dtype else None


def check_labels(
    image: Tensor, text: Tensor, image_labels: Tensor | None, text_labels: Tensor | None, exclude_self: bool
) -> None:
    """Raise unless the labels are absent, or integer vectors with one label per row of the features."""
    if image_labels is None and text_labels is None:
        if exclude_self:
            raise ValueError("exclude_self needs labels: without labels, pair (i, i) is the only positive of row i")
        return
    if image_labels is None or text_labels is None:
        missing = "image_labels" if image_labels is None else "text_labels"
        raise ValueError(f"{missing} is missing: pass both image_labels and text_labels, or neither")
    for side, x, labels in (("image", image, image_labels), ("text", text, text_labels)):
        if not isinstance(labels, Tensor):
            raise TypeError(
                f"{side}_labels must be a torch.Tensor, got {type(labels).__name__}: convert it with torch.as_tensor"
            )
        if str(labels.dtype).removeprefix("torch.") not in _INTEGERS:
            raise TypeError(f"{side}_labels must be integers: {describe(side + '_labels', labels)}")
        if labels.dim() != 1 or labels.shape[0] != x.shape[0] or labels.device != x.device:
            raise ValueError(
                f"{side}_labels must hold one label per row: {describe(side + '_labels', labels)} for "
                f"{describe(side + '_features', x)}"
            )


def check_share(name: str, value: Any) -> float:
    """Return as a float a weight or fraction in [0, 1], which is given as a number or a tensor of one element."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise TypeError(f"{name} does not receive a gradient: pass {name}.item()")
        value = value.item() if value.numel() == 1 else value
    share = number(name, value)
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return share


def flag(name: str, value: Any) -> bool:
    """Return `value`, a boolean of Python, numpy or torch or an int, as a bool."""
    dtype = getattr(value, "dtype", None)
    if isinstance(value, int) or getattr(dtype, "kind", None) == "b" or dtype is torch.bool:
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {value!r}")


def check_reduction(reduction: str, allowed: tuple[str, ...]) -> None:
    if reduction not in allowed:
        names = f"{', '.join(map(repr, allowed[:-1]))} or {allowed[-1]!r}"
        raise ValueError(f"reduction must be {names}, got {reduction!r}")


def check_shard(backend: str | None, image: Tensor, *others: Tensor) -> None:
    """Before the ranks communicate, raise the errors that would otherwise stop one rank while the others wait for it.

    Raise RuntimeError if the backend does not support features like `image`, or under torch.func transforms and
    forward-mode derivatives, which the collectives do not support. Raise ValueError if the workspace size in the
    environment is not a number.
    """
    if transformed(image, *others):
        raise RuntimeError(
            "group= does not support torch.func transforms and forward-mode derivatives: pass group=None"
        )
    pick(backend, image)
    env.workspace_bytes()


def can_be_read(x: Tensor) -> bool:
    """Return True if `x` can be read without waiting for a device, and the call is neither traced nor transformed."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    return not recorded(x) and not transformed(x)


def number(name: str, value: Any, allowed: str = "a number") -> float:
    """Return a real number as a float.

    The number may be one of Python, of numpy (including an array of one element) or of torch's symbolic shapes. Raise
    TypeError for anything else, including True and False. The message names what is `allowed`.
    """
    if isinstance(value, (float, torch.SymFloat)):
        return value  # type: ignore[return-value]
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):  # before `size`: it may be symbolic
        return float(value)
    if getattr(value, "size", None) == 1 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, Decimal)):
        raise TypeError(f"{name} must be {allowed}, got {type(value).__name__}")
    return float(value)


def scalar(name: str, value: Any, image: Tensor) -> Tensor:
    """Return `value`, a number or a tensor of one element, as a tensor () on the device of `image`.

    Its dtype is fp32, or fp64 for fp64 features.
    """
    if type(value) is Tensor and value.dtype == torch.float32 and value.shape == () and value.device == image.device:
        return value if image.dtype != torch.float64 else value.double()
    dtype = torch.promote_types(image.dtype, torch.float32)
    if not isinstance(value, Tensor):
        value = number(name, value, "a number or a torch.Tensor of one element")
        if torch.compiler.is_compiling():
            # Multiply, because `new_full` would make the number a constant of the graph
            return image.new_ones((), dtype=dtype) * value
        return image.new_full((), value, dtype=dtype)
    if type(value).__name__ == "DTensor":
        raise TypeError(f"{name} must be a plain tensor, got a DTensor: pass {name}.full_tensor()")
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be real: {describe(name, value)}")
    if value.numel() != 1:
        raise ValueError(f"{name} must have one element: {describe(name, value)}")
    return (value.reshape(()) if value.dim() else value).to(device=image.device, dtype=dtype)
