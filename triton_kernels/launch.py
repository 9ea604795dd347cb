"""Launch code of the kernels: configurations, the choice of memory access, workspace sizes and matrix products."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastclip.system import env
from fastclip.system.rounding import ceil_div

__all__ = [
    "BwdSide",
    "Config",
    "FwdSide",
    "LimitedSide",
    "Matrix",
    "PairSide",
    "TileLaunch",
    "Tiles",
    "addmm",
    "always_anew",
    "chunks",
    "interpreting",
    "launch",
    "limits2",
    "matrix",
    "panels_of",
    "processors",
    "with_rows",
]

# addmm of torch before 2.10 adds to the dtype of its operands only, not to fp32 sums of 16-bit products
_OLD_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10)

_DEFAULT_PROCESSORS = 132  # of an H100; used if there is no GPU


class Config(NamedTuple):
    """Shape of a tile, (BLOCK_M, BLOCK_N) logits computed BLOCK_K features at a time, and the launch options for it."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    SPLIT: int = 1  # column parts of a tile, which the epilogue handles one after the other to save registers
    # `TileLaunch` sets these three from the features; the kernel is compiled for their values
    DESCRIPTOR: bool = False
    EVEN_K: bool = False
    PRECISION: str = "ieee"


class Matrix(NamedTuple):
    """A matrix whose rows are contiguous (column stride 1), as a kernel argument.

    The first launch needs this class, because Triton compiles by field names. Later launches accept any tuple.
    """

    ptr: Tensor
    row_stride: int


class Tiles(Protocol):
    """Interface of tile kernels from another backend, such as the CUDA backend's Hopper kernels.

    A launcher that receives `tiles` starts them in place of the Triton tile kernels. Repairs stay in Triton. x (M, D)
    and y (N, D) are the 16-bit features of one block; the vectors belong to the block's rows and columns. The Triton
    kernel of the same name defines what each method computes.
    """

    def config(self, kernel: str, M: int, N: int, labels: bool) -> Config: ...

    def contrastive_fwd(
        self, tile: Config, x: Tensor, y: Tensor, row: FwdSide, col: FwdSide, constants: Tensor, offset: int,
        exclude_self: bool,
    ) -> None: ...  # fmt: skip

    def contrastive_bwd(
        self, tile: Config, x: Tensor, y: Tensor, row: BwdSide, col: BwdSide, constants: Tensor, offset: int,
        exclude_self: bool, weights: Tensor, part: Tensor,
    ) -> None: ...  # fmt: skip

    def sigmoid_fwd(
        self, tile: Config, x: Tensor, y: Tensor, row_factor: Tensor, col_factor: Tensor, constants: Tensor,
        offset: int, bias: Tensor, weights: Tensor | None, part: Tensor,
    ) -> None: ...  # fmt: skip


class FwdSide(NamedTuple):
    """Vectors of one side (images or texts) of a block, read and written by `contrastive_fwd`."""

    factor: Tensor  # (size,) fp32
    label: Tensor | None  # (size,) int32
    part: Tensor  # (planes, tiles across, size) fp32


class LimitedSide(NamedTuple):
    """Vectors of one side of a block with limits: the fields of `FwdSide`, and the limits."""

    factor: Tensor
    label: Tensor | None
    part: Tensor
    limit: Tensor  # (size,) fp32, largest z2 that counts as a negative


class PairSide(NamedTuple):
    """Vectors of one side of a block of the sigmoid loss, if it has labels or limits."""

    factor: Tensor  # (size,) fp32
    label: Tensor | None  # (size,) int32
    limit: Tensor | None  # (size,) fp32, largest logit without the bias that counts as a negative


class BwdSide(NamedTuple):
    """Vectors of one side of a block, read by `Tiles.contrastive_bwd`; the last three are present with labels only."""

    factor: Tensor  # (size,) fp32, like the others except `label`
    neg: Tensor
    label: Tensor | None = None  # int32
    pos: Tensor | None = None
    own: Tensor | None = None


# Keys: kernel, chip, dtype of the features, labels or not. No configuration spills registers
# (tests/backends/test_triton_compiled.py checks it).
CONFIGS = {
    ("contrastive_fwd", "hopper", "fp16", False): Config(128, 128, 64, 4, 3),
    ("contrastive_fwd", "hopper", "fp16", True): Config(128, 64, 64, 4, 3),
    ("contrastive_fwd", "hopper", "fp32", False): Config(128, 128, 32, 8, 3),
    ("contrastive_fwd", "hopper", "fp32", True): Config(128, 64, 32, 8, 3),
    ("contrastive_fwd", "other", "fp16", False): Config(128, 128, 32, 8, 3),
    ("contrastive_fwd", "other", "fp16", True): Config(128, 64, 32, 8, 3),
    ("contrastive_fwd", "other", "fp32", False): Config(128, 64, 32, 8, 3),
    ("contrastive_fwd", "other", "fp32", True): Config(128, 64, 32, 8, 3),
    ("contrastive_fwd_repair", "hopper", "fp16", False): Config(128, 128, 64, 8, 3),
    ("contrastive_fwd_repair", "hopper", "fp16", True): Config(64, 64, 64, 4, 3),
    ("contrastive_fwd_repair", "hopper", "fp32", False): Config(128, 64, 32, 8, 3),
    ("contrastive_fwd_repair", "hopper", "fp32", True): Config(64, 64, 32, 8, 3),
    ("contrastive_fwd_repair", "other", "fp16", False): Config(128, 64, 32, 8, 3),
    ("contrastive_fwd_repair", "other", "fp16", True): Config(128, 64, 32, 8, 3),
    ("contrastive_fwd_repair", "other", "fp32", False): Config(128, 64, 32, 8, 3),
    ("contrastive_fwd_repair", "other", "fp32", True): Config(128, 64, 32, 8, 3),
    ("contrastive_bwd", "hopper", "fp16", False): Config(128, 128, 64, 4, 3, SPLIT=4),
    ("contrastive_bwd", "hopper", "fp16", True): Config(128, 64, 64, 4, 3, SPLIT=2),
    ("contrastive_bwd", "hopper", "fp32", False): Config(128, 128, 32, 8, 3, SPLIT=4),
    ("contrastive_bwd", "hopper", "fp32", True): Config(128, 64, 32, 8, 3),
    ("contrastive_bwd", "other", "fp16", False): Config(128, 128, 32, 8, 3, SPLIT=4),
    ("contrastive_bwd", "other", "fp16", True): Config(128, 64, 32, 8, 3, SPLIT=2),
    ("contrastive_bwd", "other", "fp32", False): Config(128, 64, 32, 8, 3, SPLIT=2),
    ("contrastive_bwd", "other", "fp32", True): Config(128, 64, 32, 8, 3, SPLIT=2),
    ("contrastive_bwd_repair", "hopper", "fp16", False): Config(128, 128, 64, 8, 3, SPLIT=4),
    ("contrastive_bwd_repair", "hopper", "fp16", True): Config(128, 64, 64, 8, 3, SPLIT=2),
    ("contrastive_bwd_repair", "hopper", "fp32", False): Config(128, 64, 32, 8, 3, SPLIT=2),
    ("contrastive_bwd_repair", "hopper", "fp32", True): Config(64, 64, 32, 8, 3),
    ("contrastive_bwd_repair", "other", "fp16", False): Config(128, 64, 32, 8, 3, SPLIT=2),
    ("contrastive_bwd_repair", "other", "fp16", True): Config(128, 64, 32, 8, 3, SPLIT=2),
    ("contrastive_bwd_repair", "other", "fp32", False): Config(128, 64, 32, 8, 3, SPLIT=2),
    ("contrastive_bwd_repair", "other", "fp32", True): Config(128, 64, 32, 8, 3, SPLIT=4),
    ("distill_fwd", "hopper", "fp16", False): Config(64, 64, 64, 4, 3),
    ("distill_fwd", "hopper", "fp32", False): Config(64, 64, 32, 4, 3),
    ("distill_fwd", "other", "fp16", False): Config(64, 64, 32, 4, 3),
    ("distill_fwd", "other", "fp32", False): Config(64, 32, 32, 8, 3),
    ("distill_bwd", "hopper", "fp16", False): Config(128, 64, 64, 8, 3),
    ("distill_bwd", "hopper", "fp32", False): Config(128, 64, 32, 8, 3),
    ("distill_bwd", "other", "fp16", False): Config(128, 64, 32, 8, 3),
    ("distill_bwd", "other", "fp32", False): Config(128, 64, 32, 8, 3),
    ("sigmoid_fwd", "hopper", "fp16", False): Config(128, 128, 64, 8, 3, SPLIT=4),
    ("sigmoid_fwd", "hopper", "fp16", True): Config(128, 64, 64, 8, 3, SPLIT=2),
    ("sigmoid_fwd", "hopper", "fp32", False): Config(128, 64, 32, 8, 3),
    ("sigmoid_fwd", "hopper", "fp32", True): Config(128, 64, 32, 8, 3, SPLIT=2),
    ("sigmoid_fwd", "other", "fp16", False): Config(128, 64, 32, 8, 3, SPLIT=2),
    ("sigmoid_fwd", "other", "fp16", True): Config(128, 64, 32, 8, 3, SPLIT=2),
    ("sigmoid_fwd", "other", "fp32", False): Config(128, 64, 32, 8, 3, SPLIT=2),
    ("sigmoid_fwd", "other", "fp32", True): Config(128, 64, 32, 8, 3, SPLIT=2),
}


_INTERPRETED = Config(128, 128, 64, 4, 1, SPLIT=2)  # large: the interpreter is slow per operation


def interpreting() -> bool:
    """Return True if the kernels run as Python on the CPU (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}  # compiled kernels and their last arguments


def launch(kernel: Any, grid: int, *args: Any, **options: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """Launch a kernel; return it compiled, with its last (constant) arguments, or None if it must not be reused.

    Triton's lookup of the compiled kernel costs more host time than the launch itself. The lookup therefore runs once
    per kind of arguments (see `_kind`) and its result is kept. Triton's pre-run hooks also run only that once.
    """
    if always_anew():
        kernel[(grid,)](*args, **options)
        return None
    device = triton.runtime.driver.active.get_current_device()
    key = (kernel.fn, device, *options.values(), *map(_kind, args))
    if started := _compiled.get(key):
        compiled, constants = started
        compiled[grid, 1, 1](*args, *constants)
    elif compiled := kernel[(grid,)](*args, **options):
        started = _compiled[key] = compiled, tuple(options.get(p.name, p.default) for p in kernel.params[len(args) :])
    return started


def always_anew() -> bool:
    """Return True if compiled kernels must not be reused.

    The interpreter compiles nothing. On AMD, Triton also specialises by the size of the memory behind a pointer, which
    `_kind` does not see.
    """
    return interpreting() or bool(torch.version.hip)


def _kind(x: Any) -> Any:
    """Return the properties of a run-time argument that Triton specialises a kernel by.

    They are its type, its alignment to 16 and whether it is 1. The alignment decides whether a compiled kernel may use
    16-byte accesses: such a kernel would fault with a less aligned pointer.
    """
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if isinstance(x, int):  # Triton inlines 1, assumes divisibility for multiples of 16, and picks 32 or 64 bits
        return x == 1, x % 16 == 0, -(2**31) <= x < 2**31
    if isinstance(x, TensorDescriptor):
        return x.base.dtype, *x.block_shape
    if isinstance(x, tuple):
        return (*map(_kind, x),)
    return type(x)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU; (0, 0) for every other device."""
    if device.type != "cuda" or torch.version.hip:
        return 0, 0
    return torch.cuda.get_device_capability(device)


def uses_descriptors(x: Tensor) -> bool:
    """Return True if tiles are loaded through tensor descriptors.

    Hopper's tensor memory accelerator (TMA) loads whole tiles without an address per thread. On other chips plain
    pointers spill fewer registers.
    """
    return capability(x.device)[0] == 9


@functools.cache
def processors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU, or of an H100 if `device` is not a GPU."""
    if device.type != "cuda":
        return _DEFAULT_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def limits2(limits: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    """Return the limits of a problem in units of log 2, fp32."""
    if limits is None:
        return None
    return (limits[0].double() * math.log2(math.e)).float(), (limits[1].double() * math.log2(math.e)).float()


def with_rows(x: Tensor) -> Tensor:
    """Return `x` if its rows are contiguous (column stride 1), else a contiguous copy."""
    return x if x.stride(1) == 1 else x.contiguous()


def matrix(x: Tensor) -> Matrix:
    """Wrap features whose rows are contiguous as a kernel argument."""
    return Matrix(x, x.stride(0))


def choose(kernel: str, x: Tensor, labels: bool) -> Config:
    """Return the configuration of a tile kernel for the device and dtype of `x`."""
    if x.device.type == "cpu" and capability(x.device) == (0, 0):
        return _INTERPRETED
    chip = "hopper" if capability(x.device)[0] == 9 else "other"
    return CONFIGS[kernel, chip, "fp32" if x.dtype == torch.float32 else "fp16", labels]


class TileLaunch:
    """Configuration, options and grid of a tile kernel, shared by all its launches on features like `x`.

    width: columns of the features as the kernel sees them, padding included. tile: configuration to use in place of
    the one from CONFIGS.
    """

    def __init__(
        self,
        kernel: Any,
        x: Tensor,
        width: int,
        flags: dict[str, bool],
        tile: Config | None = None,
    ) -> None:
        exact = flags.get("EXACT", False)
        if tile is None:
            limits = flags.get("LIMITS", False)
            name = kernel.fn.__name__.removesuffix("_kernel") + ("_repair" if exact and not limits else "")
            tile = choose(name, x, flags.get("LABELS", False) or limits)
            # With limits forward, backward and their repairs have the same tile, whose dot products have the same bits,
            # so that all leave out the same pairs. The masks take the registers of eight warps; a repair needs parts.
            tile = tile._replace(num_warps=8, SPLIT=4 if exact else tile.SPLIT) if limits else tile
        self.kernel, self.tile, self.descriptor = kernel, tile, uses_descriptors(x)
        precision = fp32_products() if x.dtype is torch.float32 else "ieee"
        self.options = {**flags, **_tile_options(tile, self.descriptor, width % tile.BLOCK_K == 0, precision)}
        # A repair is launched always and is rarely needed. Its programs are persistent, so that when there is nothing
        # to repair only one program per multiprocessor starts and returns.
        self.max_programs = processors(x.device) if exact else None

    def shape(self, M: int, N: int) -> tuple[int, int]:
        """Numbers of tile rows and tile columns of a block."""
        return ceil_div(M, self.tile.BLOCK_M), ceil_div(N, self.tile.BLOCK_N)

    def tiles(self, M: int, N: int) -> int:
        rows, columns = self.shape(M, N)
        return rows * columns

    def programs(self, M: int, N: int) -> int:
        tiles = self.tiles(M, N)
        return tiles if self.max_programs is None else min(tiles, self.max_programs)

    def operands(self, image: Tensor, text: Tensor) -> tuple[Any, Any]:
        """Return both features as kernel arguments: tensor descriptors or matrices."""
        tile = self.tile
        return self._matrix(image, tile.BLOCK_M, tile.BLOCK_K), self._matrix(text, tile.BLOCK_N, tile.BLOCK_K)

    def output(self, out: Tensor) -> Any:
        """Return the output matrix as a kernel argument, in tiles of the epilogue's parts."""
        return self._matrix(out, self.tile.BLOCK_M, self.tile.BLOCK_N // self.tile.SPLIT)

    def _matrix(self, x: Tensor, *block: int) -> TensorDescriptor | Matrix:
        return TensorDescriptor.from_tensor(x, [*block]) if self.descriptor else matrix(x)


@functools.cache
def _tile_options(tile: Config, descriptor: bool, even_k: bool, precision: str) -> dict[str, Any]:
    return {
        "CONFIG": tile._replace(DESCRIPTOR=descriptor, EVEN_K=even_k, PRECISION=precision),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,  # explicit, because Triton's default is about to change
    }


def panels_of(tiles: Sequence[Config], M: int, N: int, planes: int) -> tuple[int, int, int]:
    """Return the number of rows of a panel whose partial sums fit into the workspace, and the largest numbers of tiles
    along its rows and along its columns, over all configurations in `tiles`.

    planes: partial sums that a tile stores per row and column. 8 bytes each: a repair stores them in fp64.
    """
    row_bytes = 8 * planes * max(ceil_div(N, tile.BLOCK_N) + N / tile.BLOCK_M for tile in tiles)
    step = max(tile.BLOCK_M for tile in tiles)  # whole tiles of every configuration: all BLOCK_M are powers of two
    panel = min(max(int(env.workspace_bytes("cuda") / row_bytes) // step, 1) * step, M)
    return panel, max(ceil_div(N, tile.BLOCK_N) for tile in tiles), max(ceil_div(panel, tile.BLOCK_M) for tile in tiles)


def fp32_products() -> str:
    """Return Triton's `input_precision` for products of fp32 tiles.

    "tf32" if torch's matrix products are set to TF32, else "tf32x3" (three TF32 products, close to fp32 precision).
    "ieee" without an NVIDIA GPU.
    """
    if not torch.cuda.is_available() or torch.version.hip:
        return "ieee"
    asked = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    # Only an older torch lacks fp32_precision. In a newer torch the call below would raise if fp32_precision was set.
    if asked is None:
        asked = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if asked == "tf32" else "tf32x3"


def addmm(out: Tensor, a: Tensor, b: Tensor, keep: bool) -> None:
    """Write the product a b to `out` (fp32), or add it if `keep`, through torch's BLAS library."""
    if a.dtype != torch.float32 and capability(out.device) != (0, 0):
        if keep and _OLD_TORCH:
            out.add_(torch.mm(a, b, out_dtype=torch.float32))
        elif keep:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
        return
    torch.addmm(out, a.float(), b.float(), beta=int(keep), out=out)


def chunks(size: int, length: int) -> list[tuple[int, int]]:
    """Cut range(size) into parts of at most `length`; return the start and the (exclusive) end of each."""
    return [(start, min(start + length, size)) for start in range(0, size, length)]
