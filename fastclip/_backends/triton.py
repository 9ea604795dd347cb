"""The Triton backend for recent GPUs, and for the CPU under TRITON_INTERPRET=1. The kernels are in `triton_kernels`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastclip._backends.problem import (
    FUSED_DTYPES,
    Problem,
    Side,
    SideGrads,
    Sides,
    TeacherSide,
    TeacherSides,
    in_turn,
)
from fastclip._backends.reference import saved_dtype

__all__ = [
    "contrastive_bwd",
    "contrastive_fwd",
    "distill_bwd",
    "distill_fwd",
    "missing",
    "plain_bwd",
    "plain_fwd",
    "plain_saved",
    "refuses",
    "sigmoid_bwd",
    "sigmoid_fwd",
]


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


@functools.cache
def import_error() -> str | None:
    """Return the reason why Triton cannot be used on this machine, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    try:
        kernels = importlib.import_module("fastclip.triton_kernels")
        if _number(kernels.TRITON) < _number(kernels.OLDEST):
            return f"it needs Triton {kernels.OLDEST} or newer, but {kernels.TRITON} is installed"
        importlib.import_module("fastclip.triton_kernels.launch")
    except Exception as error:  # an incomplete installation may raise anything
        return f"Triton does not load ({type(error).__name__}: {error})"
    return None


def _interpreting() -> bool:
    return bool(importlib.import_module("fastclip.triton_kernels.launch").interpreting())


@functools.cache
def _old_gpu(index: int) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0):
        return f"it needs compute capability 8.0 or newer, which {torch.cuda.get_device_name(index)} does not have"
    return None


def missing() -> str | None:
    if reason := import_error():
        return reason
    if _interpreting():
        return None
    if not torch.cuda.is_available():
        return "torch sees no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return None


def refuses(image: Tensor, named: bool) -> str | None:
    if image.dtype not in FUSED_DTYPES:
        return f"it supports float32, bfloat16 and float16, not {str(image.dtype).removeprefix('torch.')}"
    if image.device.type == "cpu" and not named:  # before any query of the GPU, which would break forked workers
        return "it supports GPU tensors, not CPU tensors (to debug it in Triton's interpreter, pass backend='triton')"
    if reason := import_error():
        return reason
    if not _interpreting():
        if image.device.type != "cuda":
            return f"it supports GPU tensors, not {image.device.type} tensors"
        return _old_gpu(image.get_device())
    if image.device.type != "cpu":
        return f"TRITON_INTERPRET=1 is set: it supports CPU tensors, not {image.device.type} tensors"
    if image.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly; use float32 or float16 with TRITON_INTERPRET=1"
    return None


def _on_device(function: Any) -> Any:
    """Make the device of the features the current one, because Triton launches kernels on the current device."""

    @functools.wraps(function)
    def wrapped(problem: Tensor | Sequence[Any], *args: Any, **options: Any) -> Any:
        image = problem if isinstance(problem, Tensor) else problem[0]
        if image.device.type != "cuda" or image.get_device() == torch.cuda.current_device():
            return function(problem, *args, **options)
        with torch.cuda.device(image.device):
            return function(problem, *args, **options)

    return wrapped


@_on_device
def contrastive_fwd(p: Problem, maxima: bool = False, tiles: Any = None) -> Sides:
    """Compute `reference.contrastive_fwd`. `tiles` (`triton_kernels.launch.Tiles`) replaces Triton's tile kernels."""
    launcher = importlib.import_module("fastclip.triton_kernels.contrastive_fwd")
    # Each statistic of the rows, then of the columns
    in_turn = launcher.contrastive_fwd(*p, maxima=maxima, tiles=tiles)
    return Side(*in_turn[0::2]), Side(*in_turn[1::2])


@_on_device
def contrastive_bwd(
    p: Problem, stats: Sides, grads: tuple[SideGrads, SideGrads], needs: list[bool], tiles: Any = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute `reference.contrastive_bwd`. `tiles` replaces Triton's tile kernels."""
    launcher = importlib.import_module("fastclip.triton_kernels.contrastive_bwd")
    rows, cols = (side.tensors() for side in stats)
    return launcher.contrastive_bwd(*p, in_turn(rows, cols), in_turn(*grads), needs, tiles=tiles)


def _tensors(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    return p.image, p.text, p.scale


@_on_device
def distill_fwd(p: Problem, teachers: Sequence[Problem]) -> tuple[Sides, TeacherSides]:
    """Compute `reference.distill_fwd`."""
    launcher = importlib.import_module("fastclip.triton_kernels.distill_fwd")
    models = _tensors(p), [_tensors(t) for t in teachers]
    of_student, of_teachers = launcher.distill_fwd(*models, p.offset, p.normalize)
    none = p.image.new_empty(0)
    rows, cols = (Side(neg, pos, none, inv) for neg, pos, inv in (of_student[0::2], of_student[1::2]))
    return (rows, cols), (TeacherSide(*of_teachers[0::2]), TeacherSide(*of_teachers[1::2]))


@_on_device
def distill_bwd(
    p: Problem,
    teachers: Sequence[Problem],
    stats: Sides,
    of_teachers: TeacherSides,
    grads: tuple[SideGrads, SideGrads],
    d_cosine: tuple[Tensor, Tensor],
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute `reference.distill_bwd`."""
    launcher = importlib.import_module("fastclip.triton_kernels.distill_bwd")
    models = _tensors(p), [_tensors(t) for t in teachers]
    neg, teacher_neg = tuple(side.neg for side in stats), tuple(side.neg for side in of_teachers)
    derivatives = tuple(d.neg for d in grads), tuple(d.pos for d in grads), d_cosine
    return launcher.distill_bwd(*models, p.offset, p.normalize, neg, teacher_neg, *derivatives, needs)


@functools.cache
def _sigmoid() -> Any:
    return importlib.import_module("fastclip.triton_kernels.sigmoid")


@_on_device
def sigmoid_fwd(
    p: Problem, bias: Tensor, divisor: int, needs: list[bool], dtype: torch.dtype, tiles: Any = None
) -> tuple[Tensor | None, ...]:
    """Compute `reference.sigmoid_fwd`. `tiles` replaces Triton's tile kernels."""
    options = p.offset, p.normalize, divisor, needs, saved_dtype(p.image), dtype, tiles
    return _sigmoid().sigmoid_fwd(p.image, p.text, p.scale, bias, *options, p.labels, p.exclude_self, p.limits)


@_on_device
def sigmoid_bwd(inputs: Sequence[Tensor], kept: Sequence[Tensor | None], d_loss: Tensor) -> tuple[Tensor | None, ...]:
    """Compute `reference.sigmoid_bwd`."""
    return _sigmoid().sigmoid_bwd(inputs, kept, d_loss)


@functools.cache
def _plain() -> Any:
    return importlib.import_module("fastclip.triton_kernels.plain")


def plain_saved(N: int) -> int:
    """Return how many fp32 numbers `plain_fwd` saves for `plain_bwd` with N pairs."""
    return int(_plain().plain_saved(N))


@_on_device
def plain_fwd(
    image: Tensor, text: Tensor, scale: Tensor, image_weight: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Compute `reference.plain_fwd`, the mean loss of pairs."""
    return _plain().plain_fwd(image, text, scale, image_weight, normalize)


@_on_device
def plain_bwd(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    saved: Tensor,
    image_weight: float,
    normalize: bool,
    d_loss: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute `reference.plain_bwd`, the gradients of that loss."""
    return _plain().plain_bwd(image, text, scale, saved, image_weight, normalize, d_loss, needs)
