"""The CPU backend: torch.mm writes blocks of logits into one reused buffer, and native code (csrc/cpu) reads them."""

from __future__ import annotations

from torch import Tensor

from fastclip._backends.cpu.contrastive import contrastive_bwd, contrastive_fwd
from fastclip._backends.cpu.direction import direction_fits, direction_fwd
from fastclip._backends.cpu.distillation import distill_bwd, distill_fwd
from fastclip._backends.cpu.native import build, missing
from fastclip._backends.cpu.plain import plain_bwd, plain_fwd, plain_saved
from fastclip._backends.cpu.sigmoid import sigmoid_fwd
from fastclip._backends.problem import FUSED_DTYPES
from fastclip._backends.reference import direction_bwd, sigmoid_bwd

__all__ = [
    "build",
    "contrastive_bwd",
    "contrastive_fwd",
    "direction_bwd",
    "direction_fits",
    "direction_fwd",
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


def refuses(image: Tensor, named: bool) -> str | None:
    if image.device.type != "cpu":
        return f"it supports CPU tensors, not {image.device.type}"
    if image.dtype not in FUSED_DTYPES:
        return f"it supports float32, bfloat16 and float16, not {str(image.dtype).removeprefix('torch.')}"
    return None
