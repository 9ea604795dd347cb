"""A fixed sequence of launches: of kernels that it knows the host does no more for each than Triton's own launcher."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from fastclip.triton_kernels.launch import always_anew, launch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["Base", "Sequence"]

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
        # Whoever wants to hear of launches, such as a profiler, hears of them from Triton's own call
        for hook in (_runtime.launch_enter_hook, _runtime.launch_exit_hook):
            if hook is not None and (hook.__class__ is not _HookChain or hook.calls):
                return _First(), False
        known, at = self.known, -1
        if known is None:
            return _First(), False
        stream, maps = self.stream(self.device), {}

        def start(kernel: Any, grid: Any, args: Any, options: Any) -> None:
            nonlocal at  # a number of the closure: an iterator or an object would cost every launch a call
            at += 1
            run, programs, between, together, constants, described = known[at]
            if described:
                args = [*args]
                for index, fill, about, tail in described:  # from the last to the first
                    key = args[index], about
                    if key not in maps:  # a repair reads what the launch before it read
                        maps[key] = fill(args[index], *about)
                    args[index : index + 1] = maps[key], *tail
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
