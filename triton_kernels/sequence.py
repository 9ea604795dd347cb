"""A fixed sequence of launches: of kernels that it knows the host does no more for each than Triton's own launcher."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from fastclip.triton_kernels.launch import (
    Config,
    always_anew,
    cdiv,
    choose,
    launch,
    processors,
    tile_options,
    uses_descriptors,
)
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["Base", "Sequence", "TileLaunch"]

_runtime = triton.knobs.runtime
_HookChain = getattr(triton.knobs, "HookChain", None)
_TRITON = triton.__version__.rpartition(".")[0]
# Releases of Triton whose CudaLauncher was read; others are started by its public call
_READ_LAUNCHERS = ("3.7", "3.8")
_ELEMENTS = {**{k: k for k in range(16)}, 8: 10, 9: 8, 10: 9}  # its TMA_DTYPE_DEVICE_TO_HOST


class Base:
    """A tensor to which bytes are added, as they are to an address."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.size = x, x.element_size()

    def __add__(self, offset: int) -> Tensor:
        return self.x[offset // self.size :]


class Sequence:
    """Launches whose kernels and grids a problem's signature fixes.

    The first time each is started by `launch`, from tensors and tensor descriptors. Where that leaves all that the next
    time needs, they are started afterwards as Triton itself ends, from addresses, also in place of descriptors: nobody
    asks any more what the arguments are.

        start, known = sequence.begin()
        start(kernel, grid, arguments, options)  # grid: a number, or a function and its arguments for the first time
        if not known:
            sequence.keep(start)
    """

    def __init__(self, fixed: bool) -> None:
        self.fixed = fixed and not always_anew()
        self.known: list[_Known] | None = None
        if self.fixed:
            driver = triton.runtime.driver.active
            self.device, self.stream = driver.get_current_device(), driver.get_current_stream

    def begin(self) -> tuple[Any, bool]:
        known, at = self.known, -1
        before, after = _runtime.launch_enter_hook, _runtime.launch_exit_hook
        # Whoever wants to be told of launches, such as a profiler, is told by Triton's own call
        told = before is not None and (before.__class__ is not _HookChain or before.calls)
        told = told or (after is not None and (after.__class__ is not _HookChain or after.calls))
        if known is None or told:
            return _First(), False
        stream, maps = self.stream(self.device), {}

        def start(kernel: Any, grid: Any, args: Any, options: Any) -> None:
            nonlocal at
            at += 1
            run, programs, between, together, constants, described = known[at]
            if described:
                args = [*args]
                for index, fill, about, tail in described:  # from the last to the first
                    of = args[index], about
                    if of not in maps:  # a repair reads what the launch before it read
                        maps[of] = fill(args[index], *about)
                    args[index : index + 1] = maps[of], *tail
            if together:
                run(programs, 1, 1, stream, *between, (*args, *constants))
            else:
                run(programs, 1, 1, stream, *between, *args, *constants)

        return start, True

    def keep(self, first: _First) -> None:
        if self.fixed and None not in first.started:
            self.known = [_known(*started, *how) for started, how in zip(first.started, first.how)]


class _First:
    """A sequence the first time."""

    def __init__(self) -> None:
        self.started: list[Any] = []  # kernels and their last arguments
        self.how: list[tuple[int, dict[int, Any]]] = []  # programs, and descriptors among the arguments

    def __call__(self, kernel: Any, grid: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        programs = grid if isinstance(grid, int) else grid[0](*grid[1])
        self.how.append((programs, {k: x for k, x in enumerate(args) if isinstance(x, TensorDescriptor)}))
        self.started.append(launch(kernel, programs, *args, **options))


class _Known(NamedTuple):
    """How a kernel is started again."""

    run: Any
    programs: int
    between: tuple[Any, ...]  # what stands between the stream and the arguments
    together: bool  # whether these are one tuple
    constants: tuple[Any, ...]  # the last of them
    described: tuple[Any, ...]  # of each descriptor: where, how it is made of an address, of what; what follows it


class _Address(NamedTuple):
    """As much of a tensor as a descriptor asks for."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


def _describe(
    address: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], block_shape: tuple[int, ...]
) -> TensorDescriptor:
    return TensorDescriptor(_Address(address, dtype), [*shape], [*strides], [*block_shape])


def _known(
    compiled: Any, constants: tuple[Any, ...], programs: int, descriptors: dict[int, TensorDescriptor]
) -> _Known:
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    no_scratch = not (getattr(run, "global_scratch_size", 1) or getattr(run, "profile_scratch_size", 1))
    abouts = getattr(compiled.metadata, "tensordesc_meta", None) or ()
    read = _TRITON in _READ_LAUNCHERS and type(run).__name__ == "CudaLauncher" and no_scratch
    if not read or getattr(run, "gsan_enabled", False) or len(abouts) != len(descriptors):
        described = [
            (index, _describe, (x.base.dtype, tuple(x.shape), tuple(x.strides), tuple(x.block_shape)), ())
            for index, x in descriptors.items()
        ]
        return _Known(run, programs, (function, metadata, None, None, None), False, constants, tuple(described))
    # What CudaLauncher.__call__ comes to where a kernel asks for no memory: six Python calls less
    driver = triton.runtime.driver.active
    flags = run.launch_cooperative_grid, run.launch_pdl
    nothing = [None] * 5  # metadata for hooks, hooks, memory
    between = function, *flags, metadata, *nothing, run.arg_annotations, run.kernel_signature
    # As its make_tensordesc_arg: a map, sizes and strides in place of a descriptor
    maps = []
    for (index, x), about in zip(descriptors.items(), abouts):
        shape, strides = tuple(x.shape), tuple(x.strides)
        element = about["elem_size"], _ELEMENTS[about["elem_type"]]
        made = about["swizzle"], *element, tuple(about["block_size"]), shape, strides, int(x.padding == "nan")
        maps.append((index, driver.utils.fill_tma_descriptor_tiled, made, (*shape, *strides)))
    return _Known(driver.utils.launch, programs, between, True, constants, tuple(reversed(maps)))


class TileLaunch:
    """What the launches of a tile kernel have in common, for features like `x` that it sees as (M or N, width)."""

    def __init__(
        self,
        kernel: Any,
        name: str,
        x: Tensor,
        pairs: tuple[int, int],
        width: int,
        precision: str,
        flags: dict[str, Any],
        tile: Config | None = None,
    ) -> None:
        self.kernel, self.tile = kernel, tile or choose(name, x, False)
        options = tile_options(self.tile, uses_descriptors(x), width % self.tile.BLOCK_K == 0, precision)
        self.options = {**flags, **options}
        self.most = processors(x.device) if name.endswith("_repair") else None  # programs: a repair's are persistent
        self.whole = self.shape(*pairs)

    def shape(self, M: int, N: int) -> tuple[int, int]:
        """Tile rows and tile columns."""
        return cdiv(M, self.tile.BLOCK_M), cdiv(N, self.tile.BLOCK_N)

    def tiles(self, M: int, N: int) -> int:
        rows, columns = self.shape(M, N)
        return rows * columns

    def programs(self, M: int, N: int) -> int:
        tiles = self.tiles(M, N)
        return tiles if self.most is None else min(tiles, self.most)
