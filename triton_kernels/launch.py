"""How the kernels are launched: configurations, the choice of memory accesses, workspace and matrix products."""

from __future__ import annotations

import functools
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
    "Matrix",
    "TileLaunch",
    "Tiles",
    "addmm",
    "always_anew",
    "chunks",
    "interpreting",
    "launch",
    "matrix",
    "panels_of",
    "processors",
    "with_rows",
]

_OLD_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10)  # adds to the operands' dtype only

_DEFAULT_PROCESSORS = 132  # where no GPU says: an H100's


class Config(NamedTuple):
    """A tile of (BLOCK_M, BLOCK_N) logits, BLOCK_K features at a time, by so many warps and pipeline stages."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    SPLIT: int = 1  # parts of a tile that the epilogue works on one after the other
    # What follows from the features, for the kernel that is compiled
    DESCRIPTOR: bool = False
    EVEN_K: bool = False
    PRECISION: str = "ieee"


class Matrix(NamedTuple):
    """Rows without gaps between columns, as kernels are handed them: later launches take any tuple in its place."""

    ptr: Tensor
    row_stride: int


class Tiles(Protocol):
    """Tile kernels of another make: a launcher that is handed them starts them in place of its own, repairs apart.

    x (M, D), y (N, D): features of the block, 16-bit; the vectors are its rows' and columns'; see the kernels here.
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
    """One side of a block: what `Tiles.contrastive_fwd` reads and writes."""

    factor: Tensor  # (size,) fp32
    label: Tensor | None  # (size,) int32
    part: Tensor  # (planes, tiles across, size) fp32


class BwdSide(NamedTuple):
    """One side of a block: what `Tiles.contrastive_bwd` reads; the last three with labels."""

    factor: Tensor  # (size,) fp32, as all
    neg: Tensor
    label: Tensor | None = None  # int32
    pos: Tensor | None = None
    own: Tensor | None = None


# By kernel, chip, features' dtype and whether there are labels; none spills
# registers (tests/backends/test_triton_compiled.py).
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
    ("sigmoid_fwd", "hopper", "fp16", False): Config(128, 128, 64, 8, 3, SPLIT=4),
    ("sigmoid_fwd", "hopper", "fp32", False): Config(128, 64, 32, 8, 3),
    ("sigmoid_fwd", "other", "fp16", False): Config(128, 64, 32, 8, 3, SPLIT=2),
    ("sigmoid_fwd", "other", "fp32", False): Config(128, 64, 32, 8, 3, SPLIT=2),
}


_INTERPRETED = Config(128, 128, 64, 4, 1, SPLIT=2)  # large: a step of the interpreter costs the same for any tile


def interpreting() -> bool:
    """Tell whether the kernels run as Python on the CPU: TRITON_INTERPRET=1."""
    return bool(triton.knobs.runtime.interpret)


_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}  # kernels, and their last arguments


def launch(kernel: Any, grid: int, *args: Any, **options: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """Start a kernel; return it compiled and its last arguments, where they may be used again.

    Triton's own way from arguments to a compiled kernel costs more than the launch: once for each kind of arguments,
    and its hooks before a run are called then only.
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
    """Tell whether no kernel is kept: by the interpreter; on AMD, where the kind includes how far memory reaches."""
    return interpreting() or bool(torch.version.hip)


def _kind(x: Any) -> Any:
    """Tell what a kernel is compiled for, of a run-time argument: its type, its alignment, whether it is 1."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if isinstance(x, int):  # Triton compiles 1 as a constant, multiples of 16 as such, and the rest by width
        return x == 1, x % 16 == 0, -(2**31) <= x < 2**31
    if isinstance(x, TensorDescriptor):
        return x.base.dtype, *x.block_shape
    if isinstance(x, tuple):
        return (*map(_kind, x),)
    return type(x)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU; (0, 0) of everything else."""
    if device.type != "cuda" or torch.version.hip:
        return 0, 0
    return torch.cuda.get_device_capability(device)


def uses_descriptors(x: Tensor) -> bool:
    """Tell whether tiles come by Hopper's tensor memory accelerator; elsewhere pointers spill less."""
    return capability(x.device)[0] == 9


@functools.cache
def processors(device: torch.device) -> int:
    """Count a GPU's multiprocessors."""
    if device.type != "cuda":
        return _DEFAULT_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def with_rows(x: Tensor) -> Tensor:
    """Features whose rows have no gaps between columns."""
    return x if x.stride(1) == 1 else x.contiguous()


def matrix(x: Tensor) -> Matrix:
    """Hand rows without gaps to a kernel."""
    return Matrix(x, x.stride(0))


def choose(kernel: str, x: Tensor, labels: bool) -> Config:
    """The configuration of a tile kernel for features like `x`."""
    if x.device.type == "cpu" and capability(x.device) == (0, 0):
        return _INTERPRETED
    chip = "hopper" if capability(x.device)[0] == 9 else "other"
    return CONFIGS[kernel, chip, "fp32" if x.dtype == torch.float32 else "fp16", labels]


class TileLaunch:
    """What all launches of a tile kernel have in common, for features like `x`, which it sees in `width` columns."""

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
            name = kernel.fn.__name__.removesuffix("_kernel") + ("_repair" if exact else "")
            tile = choose(name, x, flags.get("LABELS", False))
        self.kernel, self.tile, self.descriptor = kernel, tile, uses_descriptors(x)
        precision = fp32_products() if x.dtype is torch.float32 else "ieee"
        self.options = {**flags, **_tile_options(tile, self.descriptor, width % tile.BLOCK_K == 0, precision)}
        # A repair's programs are persistent: where there is nothing to repair, few of them return at once
        self.max_programs = processors(x.device) if exact else None

    def shape(self, M: int, N: int) -> tuple[int, int]:
        """Tile rows and tile columns."""
        return ceil_div(M, self.tile.BLOCK_M), ceil_div(N, self.tile.BLOCK_N)

    def tiles(self, M: int, N: int) -> int:
        rows, columns = self.shape(M, N)
        return rows * columns

    def programs(self, M: int, N: int) -> int:
        tiles = self.tiles(M, N)
        return tiles if self.max_programs is None else min(tiles, self.max_programs)

    def operands(self, image: Tensor, text: Tensor) -> tuple[Any, Any]:
        """The features as the kernel is handed them."""
        tile = self.tile
        return self._matrix(image, tile.BLOCK_M, tile.BLOCK_K), self._matrix(text, tile.BLOCK_N, tile.BLOCK_K)

    def output(self, out: Tensor) -> Any:
        """What the kernel writes its tiles to."""
        return self._matrix(out, self.tile.BLOCK_M, self.tile.BLOCK_N // self.tile.SPLIT)

    def _matrix(self, x: Tensor, *block: int) -> TensorDescriptor | Matrix:
        return TensorDescriptor.from_tensor(x, [*block]) if self.descriptor else matrix(x)


@functools.cache
def _tile_options(tile: Config, descriptor: bool, even_k: bool, precision: str) -> dict[str, Any]:
    return {
        "CONFIG": tile._replace(DESCRIPTOR=descriptor, EVEN_K=even_k, PRECISION=precision),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,  # said, because Triton's default is about to change
    }


def panels_of(tiles: Sequence[Config], M: int, N: int, planes: int) -> tuple[int, int, int]:
    """Rows of a panel whose partial sums fit into the workspace, and the most tiles across a row and across a column
    of it, of tiles of these kinds."""
    row_bytes = 8 * planes * max(ceil_div(N, tile.BLOCK_N) + N / tile.BLOCK_M for tile in tiles)
    step = max(tile.BLOCK_M for tile in tiles)  # whole tiles of every kind: BLOCK_M are powers of two
    panel = min(max(int(env.workspace_bytes("cuda") / row_bytes) // step, 1) * step, M)
    return panel, max(ceil_div(N, tile.BLOCK_N) for tile in tiles), max(ceil_div(panel, tile.BLOCK_M) for tile in tiles)


def fp32_products() -> str:
    """Say how products of fp32 tiles are computed: as torch's own matrix products are asked to, else without loss."""
    if not torch.cuda.is_available() or torch.version.hip:
        return "ieee"
    asked = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if asked is None:  # an older torch; where there is the new setting, the old one raises once that was used
        asked = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if asked == "tf32" else "tf32x3"


def addmm(out: Tensor, a: Tensor, b: Tensor, keep: bool) -> None:
    """Write a b to `out`, or add it if `keep`, in fp32, by the library."""
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
    """Cut `size` rows or columns into parts of a `length`: their first and their last (exclusive)."""
    return [(start, min(start + length, size)) for start in range(0, size, length)]
