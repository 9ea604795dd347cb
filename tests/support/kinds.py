"""Pairs of a backend and a dtype, by which tests that hold for every backend are parametrised.

Without a GPU, Triton's kernels run in its interpreter and the CUDA backend's in the emulator of csrc/tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastclip
from fastclip.parity.promised import TENSOR_CORES
from support.accuracy import pairs, poisoned

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"

# (N, D) by regime, for the CPU backend and for the two GPU backends. The CPU's tiles are 64 rows by 512 columns of
# logits, and its vectors 16 or 8 columns. GPU tiles are 64 or 128 rows by 64, 128 or 192 columns, with 32 or 64
# features at a time.
SHAPES = {
    "single pair": ((1, 8), (1, 8)),  # no negatives
    "one dimension": ((2, 1), (2, 1)),
    "tiny": ((7, 3), (7, 3)),  # less than a vector
    "tile": ((64, 59), (128, 64)),  # on a CPU all rows of a tile, with an odd D
    "past a tile": ((65, 64), (129, 59)),  # by one row; on a GPU also by one column, with unaligned rows
    "columns of a tile": ((512, 16), (64, 72)),  # on a GPU of the narrowest tile, with a tail of D
    # by one column; on a GPU, tiles of any width end ragged in rows and columns
    "past columns": ((513, 32), (150, 72)),
    "RN50x4": ((130, 640), (40, 640)),
    "ALIGN": ((96, 1376), (33, 1376)),
}


class Kind(NamedTuple):
    """A backend with a dtype of the features."""

    backend: str
    dtype: torch.dtype
    by_statistics: bool = False  # the loss of pairs is computed in torch from the statistics, as losses of labels are

    def __str__(self) -> str:
        name = f"{self.backend}-{str(self.dtype).removeprefix('torch.')}"
        return f"{name}-by-statistics" if self.by_statistics else name

    @property
    def for_gpus(self) -> bool:
        return self.backend in ("triton", "cuda")

    @property
    def device(self) -> str:
        return DEVICE if self.for_gpus else "cpu"

    def shape(self, regime: str) -> tuple[int, int, int]:
        N, D = SHAPES[regime][self.for_gpus]
        return N, N, D

    def pairs(self, *shape: int, **options: Any) -> tuple[Tensor, ...]:
        return tuple(poisoned(x, self.dtype) for x in pairs(*shape, **options))

    def loss(self, **options: Any) -> Callable[..., Tensor]:
        """Return a loss that takes and returns tensors on the CPU, where the truth is computed."""
        if (labels := options.pop("labels", None)) is not None:
            options["image_labels"], options["text_labels"] = (y.to(self.device) for y in labels)
        if self.by_statistics:
            options["comm"] = "ring"  # without a group; the op of pairs serves only the default

        def loss(image: Tensor, text: Tensor, *scalars: Tensor) -> Tensor:
            function = fastclip.contrastive_loss if len(scalars) == 1 else fastclip.sigmoid_loss
            inputs = (*(kept(x, self.device) for x in (image, text)), *(x.to(self.device) for x in scalars))
            return function(*inputs, backend=self.backend, **options).to("cpu")

        return loss

    def logit_error(self, scale: float, D: int) -> float:
        """Return the error of a positive's logit that tensor cores sum, as with labels."""
        return scale * D * TENSOR_CORES if self.device == "cuda" and self.dtype != torch.float32 else 0.0

    def tolerance(self, fp32: float, half: float) -> float:
        return fp32 if self.dtype == torch.float32 else half * (8 if self.dtype == torch.bfloat16 else 1)


CPU_KINDS = [Kind("cpu", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
# The interpreter multiplies bfloat16 wrongly, so the Triton backend refuses it there
TRITON_DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
GPU_KINDS = [Kind("triton", dtype) for dtype in TRITON_DTYPES]
GPU_KINDS += [Kind("cuda", dtype) for dtype in (torch.bfloat16, torch.float16)]
KINDS = CPU_KINDS + GPU_KINDS
# The loss of pairs has two paths that must not differ: a single op, and the path of all other losses
WAYS = [*KINDS, *(Kind("cpu", dtype, by_statistics=True) for dtype in (torch.float32, torch.bfloat16, torch.float16))]
WAYS += [Kind("triton", torch.float16, by_statistics=True), Kind("cuda", torch.bfloat16, by_statistics=True)]
REFERENCE = Kind("reference", torch.float32)


def fp32(kinds: Iterable[Kind]) -> list[Kind]:
    return [kind for kind in kinds if kind.dtype == torch.float32]


def fp16(kinds: Iterable[Kind]) -> list[Kind]:
    return [kind for kind in kinds if kind.dtype == torch.float16]


def wide(kinds: Iterable[Kind]) -> list[Kind]:
    """Return the kinds whose numbers have the range of fp32."""
    return [kind for kind in kinds if kind.dtype != torch.float16]


def each_kind(kinds: Iterable[Kind], *, few: bool = False) -> pytest.MarkDecorator:
    """Parametrise a test by `kind`; on a machine with a GPU, the kinds that run on it are marked `gpu`.

    `few` marks tests that do not depend on the dtype. Without a GPU they take one dtype per GPU
    backend, or all with `--full`.
    """
    marks = {kind: [pytest.mark.gpu] if kind.device == "cuda" else [] for kind in kinds}
    if few:
        seen: set[str] = set()
        for kind in marks:
            if kind.for_gpus and not GPU and kind.backend in seen:
                marks[kind].append(pytest.mark.full)
            seen.add(kind.backend)
    parameters = [pytest.param(kind, id=str(kind), marks=marks[kind]) for kind in kinds]
    return pytest.mark.parametrize("kind", parameters, indirect=True)


def each_backend(*names: str | None) -> pytest.MarkDecorator:
    """Parametrise a test by `backend`; on a machine with a GPU, Triton's tests run on it and are marked `gpu`."""
    parameters = [pytest.param(name, marks=[pytest.mark.gpu] if GPU and name == "triton" else []) for name in names]
    return pytest.mark.parametrize("backend", parameters)


def kept(x: Tensor, device: str = DEVICE) -> Tensor:
    """Return a tensor on the device with its strides, inside a frame of NaN."""
    return x if device == "cpu" else poisoned(x).to(device) if x.dim() == 2 else x.to(device)


LAYOUTS = ["transposed", "expanded", "every other column", "unaligned", "rows apart"]


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Return the numbers of a matrix in another of the `LAYOUTS`, among NaN; "expanded" repeats its first row."""
    size, D = x.shape
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "expanded":
        return x[:1].expand(size, D)
    if layout == "every other column":
        return torch.stack([x, torch.full_like(x, torch.nan)], 2)[..., 0]
    if layout == "rows apart":
        return torch.nn.functional.pad(x, (0, 3), value=torch.nan)[:, :D]
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(size, D)


def uneven(M: int, N: int, D: int = 16, *, largest: float = 1.48) -> tuple[Tensor, Tensor]:
    """Return features with norms from 0.1 to 10^largest, whose logits are thousands apart, so
    that no single offset serves them.
    """
    image, text = pairs(M, N, D)
    rows, cols = torch.logspace(-1, largest, M), torch.logspace(largest, -1, N)
    return image * (rows / image.norm(dim=1))[:, None], text * (cols / text.norm(dim=1))[:, None]
