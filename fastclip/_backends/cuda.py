"""The CUDA backend: Hopper's own tile kernels (csrc/cuda), all but O((M + N) D) of the work.

Norms, reductions, repairs and the finish are the Triton backend's: its launchers start these tiles in place of its own.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from fastclip._backends import triton
from fastclip._backends.native import address, load
from fastclip._backends.problem import Problem

__all__ = ["build", "contrastive_bwd", "contrastive_fwd", "missing", "refuses", "sigmoid_fwd"]

_DTYPES = (torch.bfloat16, torch.float16)
_module, _not_loaded = load("_cuda")


def build() -> str:
    """nvcc's version and the architecture, or why there is no module."""
    return _not_loaded or f"nvcc {_module.COMPILER}, {_module.ARCHS}"


def _version(cuda: int) -> str:
    return f"{cuda // 1000}.{cuda % 1000 // 10}"


@functools.cache
def _driver_reason() -> str | None:
    driver, built = _module.driver(), _module.RUNTIME
    if driver == 0:
        return "there is no NVIDIA driver"
    if driver // 1000 < built // 1000:
        return f"the NVIDIA driver serves CUDA {_version(driver)}, the native module was built with {_version(built)}"
    return None


def missing() -> str | None:
    if _not_loaded:
        return _not_loaded
    if reason := triton.import_error():
        return f"its small kernels are Triton's, and {reason}"
    if _module.EMULATED:
        return None
    if reason := _driver_reason():
        return reason
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.cuda.is_initialized():  # else a look at the GPUs would keep forked processes from using them
        reasons = [_other_gpu(index) for index in range(torch.cuda.device_count())]
        return reasons[0] if all(reasons) else None
    return None


@functools.cache
def _other_gpu(index: int) -> str | None:
    if torch.version.hip is not None or torch.cuda.get_device_capability(index) != (9, 0):
        return f"it is for Hopper (compute capability 9.0), not {torch.cuda.get_device_name(index)}"
    return None


def refuses(image: Tensor, named: bool) -> str | None:
    if image.dtype not in _DTYPES:
        return f"it serves bfloat16 and float16, not {str(image.dtype).removeprefix('torch.')}"
    if image.device.type == "cpu" and named and _module is not None and _module.EMULATED:
        return None
    if image.device.type != "cuda":
        return f"it serves GPU tensors, not {image.device.type}"
    return _other_gpu(image.get_device())


class _Tiles:
    """`triton_kernels.launch.Tiles` by the native module."""

    def __init__(self, device: torch.device) -> None:
        launch = importlib.import_module("fastclip.triton_kernels.launch")
        self.new_config = launch.Config
        self.processors = launch.processors(device) if device.type == "cuda" else 4
        self.stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0

    def config(self, kernel: str, M: int, N: int, labels: bool) -> Any:
        """Wide tiles, unless they leave processors idle that narrow ones would use."""
        wide = _module.TILE_N_LABELS if labels and kernel == "contrastive_fwd" else _module.TILE_N
        pairs = -(-M // (2 * _module.TILE_M))
        few = pairs * -(-N // wide) <= self.processors // 4
        return self.new_config(_module.TILE_M, _module.TILE_N_SMALL if few else wide, 64, 12, 1)

    def _block(self, tile: Any, x: Tensor, y: Tensor, constants: Tensor, offset: int, exclude_self: bool) -> Any:
        return _module.Block(
            image=x.data_ptr(),
            text=y.data_ptr(),
            image_row_stride=x.stride(0),
            text_row_stride=y.stride(0),
            M=len(x),
            N=len(y),
            D=x.shape[1],
            offset=offset,
            exclude_self=exclude_self,
            half=x.dtype == torch.float16,
            tile_n=tile.BLOCK_N,
            processors=self.processors,
            constants=constants.data_ptr(),
            stream=self.stream,
        )

    def contrastive_fwd(
        self, tile: Any, x: Tensor, y: Tensor, row: Any, col: Any, constants: Tensor, offset: int, exclude_self: bool
    ) -> None:
        block = self._block(tile, x, y, constants, offset, exclude_self)
        _module.contrastive_fwd(block, *(_module.FwdSide(**_addresses(side)) for side in (row, col)))

    def contrastive_bwd(
        self,
        tile: Any,
        x: Tensor,
        y: Tensor,
        row: Any,
        col: Any,
        constants: Tensor,
        offset: int,
        exclude_self: bool,
        weights: Tensor,
        part: Tensor,
    ) -> None:
        block = self._block(tile, x, y, constants, offset, exclude_self)
        sides = (_module.BwdSide(**_addresses(side)) for side in (row, col))
        _module.contrastive_bwd(block, *sides, weights.data_ptr(), weights.stride(0), part.data_ptr())

    def sigmoid_fwd(
        self,
        tile: Any,
        x: Tensor,
        y: Tensor,
        row_factor: Tensor,
        col_factor: Tensor,
        constants: Tensor,
        offset: int,
        bias: Tensor,
        weights: Tensor | None,
        part: Tensor,
    ) -> None:
        block = self._block(tile, x, y, constants, offset, False)
        inputs = row_factor.data_ptr(), col_factor.data_ptr(), bias.data_ptr()
        stored = weights is not None, address(weights), 0 if weights is None else weights.stride(0)
        _module.sigmoid_fwd(block, *inputs, *stored, part.data_ptr(), part.stride(0))


def _addresses(side: Any) -> dict[str, int]:
    return {name: address(x) for name, x in side._asdict().items()}


def contrastive_fwd(p: Problem, maxima: bool = False) -> tuple[Tensor, ...]:
    """As `reference.contrastive_fwd`."""
    return triton.contrastive_fwd(p, maxima, tiles=_Tiles(p.image.device))


def contrastive_bwd(
    p: Problem, stats: list[Tensor], grads: list[Tensor], needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As `reference.contrastive_bwd`."""
    return triton.contrastive_bwd(p, stats, grads, needs, tiles=_Tiles(p.image.device))


def sigmoid_fwd(p: Problem, bias: Tensor, divisor: int, needs: list[bool]) -> tuple[Tensor | None, ...]:
    """As `reference.sigmoid_fwd`."""
    return triton.sigmoid_fwd(p, bias, divisor, needs, tiles=_Tiles(p.image.device))
