"""The CUDA backend: tile kernels for Hopper (csrc/cuda), which normally do all work that costs O(M N D).

The mean contrastive loss and the sigmoid loss of pairs without labels are computed in native code from end to end. In
all other cases the launchers of the Triton backend start these tile kernels. Triton's other kernels remain: norms,
reductions, the finish of gradients, repairs if the range of logits was too large, problems with limits, the sigmoid
loss with labels, distillation.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastclip._backends import triton
from fastclip._backends.native import address, load
from fastclip._backends.problem import Problem, SideGrads, Sides
from fastclip._backends.reference import saved_dtype
from fastclip._backends.triton import distill_bwd as distill_bwd
from fastclip._backends.triton import distill_fwd as distill_fwd
from fastclip.system import env
from fastclip.system.rounding import ceil_div

__all__ = [
    "build",
    "contrastive_bwd",
    "contrastive_fwd",
    "missing",
    "plain_bwd",
    "plain_fwd",
    "plain_saved",
    "refuses",
    "sigmoid_bwd",
    "sigmoid_fwd",
]

_DTYPES = (torch.bfloat16, torch.float16)
_SAVED = {dtype: saved_dtype(torch.empty(0, dtype=dtype)) for dtype in _DTYPES}
_module, _not_loaded = load("_cuda")


def build() -> str:
    """Return nvcc's version and the architecture, or the reason why the module is missing."""
    return _not_loaded or f"nvcc {_module.COMPILER}, {_module.ARCHS}"


def _version(cuda: int) -> str:
    return f"{cuda // 1000}.{cuda % 1000 // 10}"


@functools.cache
def _driver_reason() -> str | None:
    driver, built = _module.driver(), _module.RUNTIME
    if driver == 0:
        return "there is no NVIDIA driver"
    if driver // 1000 < built // 1000:
        return (
            f"the NVIDIA driver supports CUDA {_version(driver)}, but the native module was built with CUDA "
            f"{_version(built)}"
        )
    return None


def missing() -> str | None:
    if _not_loaded:
        return _not_loaded
    if reason := triton.import_error():
        return f"it needs Triton for its small kernels, and {reason}"
    if _module.EMULATED:
        return None
    if reason := _driver_reason():
        return reason
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.cuda.is_initialized():  # a query that initialises CUDA would keep forked processes from using the GPUs
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
        return f"it supports bfloat16 and float16, not {str(image.dtype).removeprefix('torch.')}"
    if image.device.type == "cpu" and named and _module is not None and _module.EMULATED:
        return None
    if image.device.type != "cuda":
        return f"it supports GPU tensors, not {image.device.type} tensors"
    return _other_gpu(image.get_device())


class _Tiles:
    """`triton_kernels.launch.Tiles` implemented by the native module."""

    def __init__(self, device: torch.device) -> None:
        launch = _launch()
        self.new_config = launch.Config
        self.processors = launch.processors(device) if device.type == "cuda" else 4
        self.stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0

    def config(self, kernel: str, M: int, N: int, labels: bool) -> Any:
        """Choose wide tiles, unless these leave multiprocessors (SMs) idle and narrow tiles would use more of them."""
        wide = _module.TILE_N_LABELS if labels and kernel == "contrastive_fwd" else _module.TILE_N
        few = ceil_div(M, 2 * _module.TILE_M) * ceil_div(N, wide) <= self.processors // 4
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


def contrastive_fwd(p: Problem, maxima: bool = False) -> Sides:
    """Compute `reference.contrastive_fwd`."""
    return triton.contrastive_fwd(p, maxima, tiles=None if p.limits else _Tiles(p.image.device))


def contrastive_bwd(
    p: Problem, stats: Sides, grads: tuple[SideGrads, SideGrads], needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute `reference.contrastive_bwd`."""
    return triton.contrastive_bwd(p, stats, grads, needs, tiles=None if p.limits else _Tiles(p.image.device))


# ---- losses of pairs: with few rows a training step waits for this Python code, so it makes few calls ----


@functools.cache
def _processors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device >= 0 else 4


@functools.lru_cache(maxsize=64)
def _sizes(N: int, D: int, workspace: int, processors: int) -> tuple[int, ...]:
    return _module.loss_plan(N, D, workspace, processors)


def plain_saved(N: int) -> int:
    """Return how many fp32 numbers `plain_fwd` saves for `plain_bwd`.

    The formula is that of csrc/cuda/loss_plan.cpp, repeated here because N may be symbolic.
    """
    return 64 + 12 * 32 * ((N + 31) // 32)


@functools.lru_cache(maxsize=64)
def _blocks(N: int, rows: int, columns: int) -> list[tuple[int, int, int, int]]:
    """Return (i0, i1, j0, j1) of every block of weights, the derivatives of the loss with respect to the logits.

    A block has the rows i0 to i1 - 1 and the columns j0 to j1 - 1.
    """
    chunks = _launch().chunks
    return [(*across, *along) for across in chunks(N, rows) for along in chunks(N, columns)]


def _side(x: Tensor, copied: bool, width: int) -> tuple[Tensor, Tensor, int, int, int, int]:
    """Return features with contiguous rows, the rows that the products read, and addresses and row strides of both.

    The products read the features themselves, or, if these are misaligned or `copied`, a new buffer for copies.
    """
    row, step = x.stride()
    if step != 1 and x.shape[1] > 1:
        x = x.contiguous()
        row = x.stride(0)
    at = x.data_ptr()
    if copied or at % 16 or row % 8 or row < width:
        rows = x.new_empty((x.shape[0], width))
        return x, rows, at, row, rows.data_ptr(), width
    return x, x, at, row, at, row


def _plain(
    image: Tensor, text: Tensor, scale: Tensor, image_weight: float, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Any, ...], tuple[int, ...]]:
    """Return the features and rows of both sides (`_side`), the first argument of the native calls, and the sizes."""
    N, D = image.shape
    half, device = image.dtype is torch.float16, image.get_device()
    copied, width = D % 8 != 0 or (half and normalize), (D + 7) // 8 * 8
    image, image_rows, *i = _side(image, copied, width)
    text, text_rows, *t = _side(text, copied, width)
    stream = torch._C._cuda_getCurrentRawStream(device) if device >= 0 else 0
    workspace, processors = env.workspace_bytes("cuda"), _processors(device)
    features = (i[0], t[0], i[1], t[1], i[2], t[2], i[3], t[3], N, D, half, normalize)
    problem = (*features, scale.data_ptr(), image_weight, workspace, processors, device, stream)
    return image, text, image_rows, text_rows, problem, _sizes(N, D, workspace, processors)


def plain_fwd(
    image: Tensor, text: Tensor, scale: Tensor, image_weight: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Compute `reference.plain_fwd`, the mean loss of pairs (N, D), in one native call of four kernel launches.

    scale: (), fp32, on the device. image_weight: w in w mean_i + (1 - w) mean_j.
    """
    image, *_copies, problem, sizes = _plain(image, text, scale, image_weight, normalize)
    saved = image.new_empty(sizes[0] // 4, dtype=torch.float32)
    work = image.new_empty(sizes[1], dtype=torch.uint8)
    loss = image.new_empty((), dtype=torch.float32)
    _module.loss_forward(problem, saved.data_ptr(), work.data_ptr(), loss.data_ptr())
    return loss, saved


def plain_bwd(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    saved: Tensor,
    image_weight: float,
    normalize: bool,
    d_loss: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute `reference.plain_bwd`, the gradients of that loss for d_loss (), fp32."""
    d_image = image.new_empty(image.shape) if needs[0] else None
    d_text = text.new_empty(text.shape) if needs[1] else None
    d_scale = scale.new_empty(()) if needs[2] else None
    image, text, x, y, problem, sizes = _plain(image, text, scale, image_weight, normalize)
    rows, _, stride, extra, _, columns = sizes[2:]
    N, width = x.shape
    # One allocation for the weights and, in fp32, for their products with the features
    raw = (rows + extra) * stride
    work = image.new_empty(raw + 2 * (rows + N) * width)
    kept, at = saved.data_ptr(), work.data_ptr()
    image_at, text_at = at + 2 * raw, at + 2 * raw + 4 * rows * width
    outputs = [0 if x is None else x.data_ptr() for x in (d_image, d_text, d_scale)]
    for block in _blocks(N, rows, columns):
        i0, _, j0, j1 = block
        _module.loss_weights(problem, kept, at, i0 // rows, j0)
        _add_products(block, x, y, work, 0, raw, stride, rows, needs)
        if j1 == N:
            _module.loss_finish(problem, kept, at, i0 // rows, d_loss.data_ptr(), image_at, text_at, *outputs)
    return d_image, d_text, d_scale


def _add_products(
    block: tuple[int, int, int, int],
    x: Tensor,
    y: Tensor,
    work: Tensor,
    weights_at: int,
    sums_at: int,
    stride: int,
    rows: int,
    needs: Sequence[bool],
) -> None:
    """Add the products of a block of weights with y (text rows) and x (image rows) to the gradient sums in `work`.

    `work` is allocated in the dtype of the features, and positions are counted in its 16-bit elements. The weights
    begin at element `weights_at`, with a row stride of `stride` elements. The sums begin at element `sums_at` and are
    fp32 numbers of two elements each: first the sums of at most `rows` images, then the sums of all texts.
    """
    i0, i1, j0, j1 = block
    (N, width), size, wide = x.shape, i1 - i0, j1 - j0
    weights = work.as_strided((size, wide), (stride, 1), weights_at)
    words, addmm = work.view(torch.float32), _launch().addmm
    if needs[0]:
        image_sums = words.as_strided((size, width), (width, 1), sums_at // 2)
        addmm(image_sums, weights, y if wide == N else y[j0:j1], j0 > 0)
    if needs[1]:
        text_sums = words.as_strided((wide, width), (width, 1), sums_at // 2 + (rows + j0) * width)
        addmm(text_sums, weights.t(), x if size == N else x[i0:i1], i0 > 0)


def sigmoid_fwd(
    p: Problem, bias: Tensor, divisor: int, needs: list[bool], dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """Compute `reference.sigmoid_fwd`. The loss of pairs is computed by native code in three kernel launches."""
    image, text, scale, labels, offset, _, normalize, limits = p
    fp32 = scale.dtype is bias.dtype is torch.float32
    if offset or image.shape != text.shape or not fp32 or labels or limits:
        tiles = None if labels or limits else _Tiles(image.device)
        return triton.sigmoid_fwd(p, bias, divisor, needs, dtype, tiles)
    kept = _SAVED[image.dtype]
    d_image = image.new_empty(image.shape, dtype=kept) if needs[0] else None
    d_text = text.new_empty(text.shape, dtype=kept) if needs[1] else None
    scalars = scale.new_empty(2) if needs[2] or needs[3] else None
    loss = image.new_empty((), dtype=dtype)
    image, text, x, y, problem, (_, _, rows, _, stride, _, head, columns) = _plain(image, text, scale, 0.5, normalize)
    (N, width), gradients = x.shape, True in needs
    # One allocation for all intermediate results; sizes are in elements of the features' dtype
    head //= 2
    raw = head + rows * stride
    work = image.new_empty(raw + 2 * (rows + N) * width if gradients else head)
    inputs = problem, bias.data_ptr(), work.data_ptr()
    outputs = (
        loss.data_ptr(),
        dtype is torch.float64,
        # A list, because a generator costs one more call per item
        *[0 if x is None else x.data_ptr() for x in (d_image, d_text, scalars)],
    )
    for block in _blocks(N, rows, columns):
        i0, _, j0, j1 = block
        _module.sigmoid_weights(*inputs, i0 // rows, j0, gradients)
        if gradients:
            _add_products(block, x, y, work, head, raw, stride, rows, needs)
        if j1 == N:
            _module.sigmoid_finish(*inputs, i0 // rows, divisor, *outputs)
    d_scale, d_bias = (None, None) if scalars is None else scalars.unbind()
    return loss, d_image, d_text, d_scale if needs[2] else None, d_bias if needs[3] else None


def sigmoid_bwd(inputs: Sequence[Tensor], kept: Sequence[Tensor | None], d_loss: Tensor) -> tuple[Tensor | None, ...]:
    """Compute `reference.sigmoid_bwd` in one kernel launch."""
    image, text, scale, bias = inputs
    if not scale.dtype is bias.dtype is torch.float32:
        return triton.sigmoid_bwd(inputs, kept, d_loss)
    if d_loss.dtype is not torch.float32:
        d_loss = d_loss.float()
    kept_image, kept_text, kept_scale, kept_bias = kept
    d_image = None if kept_image is None else image.new_empty(image.shape)
    d_text = None if kept_text is None else text.new_empty(text.shape)
    # Separate memory, because users may change gradients in place
    d_scale = None if kept_scale is None else scale.new_empty(())
    d_bias = None if kept_bias is None else bias.new_empty(())
    device = image.device.index if image.is_cuda else -1
    _module.sigmoid_bwd(
        d_loss.data_ptr(),
        tuple([0 if d is None else d.data_ptr() for d in kept]),
        tuple([0 if d is None else d.data_ptr() for d in (d_image, d_text, d_scale, d_bias)]),
        image.shape[0] * image.shape[1],
        text.shape[0] * text.shape[1],
        image.dtype is torch.float16,
        device,
        torch._C._cuda_getCurrentRawStream(device) if device >= 0 else 0,
    )
    return d_image, d_text, d_scale, d_bias


@functools.cache
def _launch() -> Any:
    return importlib.import_module("fastclip.triton_kernels.launch")
