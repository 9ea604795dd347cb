"""What the tests of the GPU backends share: the backends and dtypes they run with, here and on a GPU.

Without a GPU Triton's kernels run in its interpreter, the CUDA backend's in csrc/tests' emulator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastclip
from fastclip._backends import cuda
from support.accuracy import TENSOR_CORES, pairs, poisoned

pytest.importorskip("triton")
from fastclip.triton_kernels import contrastive_bwd, contrastive_bwd_vectors, contrastive_fwd, launch, sigmoid_fwd
from fastclip.triton_kernels.tile import CONSTANTS, REPAIR

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TRITON_DTYPES = [
    torch.float32,
    torch.float16,
]  # bfloat16 is backends/test_gpu.py's: the backend refuses it in the interpreter
CUDA_DTYPES = [torch.bfloat16, torch.float16]


class Kind(NamedTuple):
    """A backend with a dtype of the features."""

    backend: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.backend}-{str(self.dtype).removeprefix('torch.')}"

    def pairs(self, *shape: int, **options: Any) -> tuple[Tensor, ...]:
        return tuple(poisoned(x, self.dtype) for x in pairs(*shape, **options))

    def loss(self, **options: Any) -> Callable[..., Tensor]:
        """From and to the CPU, where the truth is."""
        if (labels := options.pop("labels", None)) is not None:
            options["image_labels"], options["text_labels"] = (y.to(DEVICE) for y in labels)

        def loss(image: Tensor, text: Tensor, *scalars: Tensor) -> Tensor:
            function = fastclip.contrastive_loss if len(scalars) == 1 else fastclip.sigmoid_loss
            inputs = (kept(image), kept(text), *(x.to(DEVICE) for x in scalars))
            return function(*inputs, backend=self.backend, **options).to("cpu")

        return loss

    def logit_error(self, scale: float, D: int) -> float:
        """Of a positive's logit that is summed by tensor cores, as with labels."""
        return scale * D * TENSOR_CORES if GPU and self.dtype != torch.float32 else 0.0

    def tolerance(self, fp32: float, half: float) -> float:
        return fp32 if self.dtype == torch.float32 else half * (8 if self.dtype == torch.bfloat16 else 1)


KINDS = [Kind("triton", dtype) for dtype in TRITON_DTYPES] + [Kind("cuda", dtype) for dtype in CUDA_DTYPES]
FP16_KINDS = [kind for kind in KINDS if kind.dtype == torch.float16]
WIDE_KINDS = [kind for kind in KINDS if kind.dtype != torch.float16]  # whose numbers reach as far as fp32's
FP32_KINDS = [kind for kind in KINDS if kind.dtype == torch.float32]


def kept(x: Tensor) -> Tensor:
    """On the device with its strides, inside its frame of NaN."""
    return x if DEVICE == "cpu" else poisoned(x).cuda() if x.dim() == 2 else x.cuda()


def uneven(M: int, N: int, D: int = 16) -> tuple[Tensor, Tensor]:
    """Norms from 0.1 to 30 in one batch: logits lie thousands apart, no single offset can serve them."""
    image, text = pairs(M, N, D)
    rows, cols = torch.logspace(-1, 1.48, M), torch.logspace(1.48, -1, N)
    return image * (rows / image.norm(dim=1))[:, None], text * (cols / text.norm(dim=1))[:, None]


class Launches:
    """Kernels launched, the CUDA backend's tiles under their Triton twins' names; whether a repair was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.arguments: list[tuple[Any, ...]] = []
        self.constants: list[Tensor] = []
        real = launch.launch

        def watched(kernel: Any, grid: int, *args: Any, **options: Any) -> None:
            real(kernel, grid, *args, **options)
            self.note(kernel.fn.__name__, args)

        for module in (contrastive_fwd, contrastive_bwd, contrastive_bwd_vectors, sigmoid_fwd):
            monkeypatch.setattr(module, "launch", watched)
        for name in ("contrastive_fwd", "contrastive_bwd", "sigmoid_fwd"):
            monkeypatch.setattr(cuda._Tiles, name, self._watch(f"{name}_kernel", getattr(cuda._Tiles, name)))

    def _watch(self, name: str, method: Any) -> Any:
        def watched(tiles: Any, tile: Any, *args: Any) -> None:
            method(tiles, tile, *args)
            flat = [x for arg in args for x in (arg if isinstance(arg, tuple) else (arg,))]
            self.note(name, tuple(flat))

        return watched

    def note(self, name: str, args: tuple[Any, ...]) -> None:
        self.names.append(name)
        self.arguments.append(args)
        self.constants += [x for x in args if isinstance(x, Tensor) and x.shape == (CONSTANTS,) and "repair" in name]

    def tensors(self, name: str) -> list[list[Tensor]]:
        """Of every launch of a kernel, the tensors it was handed; of a tensor descriptor its tensor."""
        launches = (args for found, args in zip(self.names, self.arguments) if found == name)
        return [[x for x in (getattr(x, "base", x) for x in args) if isinstance(x, Tensor)] for args in launches]

    @property
    def repaired(self) -> list[bool]:
        return [bool(x[REPAIR.value] != 0) for x in self.constants]
