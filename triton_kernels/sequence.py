"""A fixed sequence of kernel launches, replayed without Triton's argument handling.

With few rows a step takes as long as the host needs to start its kernels. Triton's Python launcher inspects every
argument of every launch to find the compiled kernel. A `Sequence` records the compiled kernels the first time, and
afterwards calls only the last, native part of the launcher with addresses.
"""

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
# Releases of Triton whose CudaLauncher has been checked against `_known`. With other releases, kernels are started
# through the launcher's public call, which does more work on the host.
_READ_LAUNCHERS = ("3.7", "3.8")
_ELEMENTS = {**{k: k for k in range(16)}, 8: 10, 9: 8, 10: 9}  # Triton's TMA_DTYPE_DEVICE_TO_HOST


class Base:
    """A tensor that supports ``base + bytes`` like an address, so that first and later launches share their code."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.size = x, x.element_size()

    def __add__(self, offset: int) -> Tensor:
        return self.x[offset // self.size :]


class Sequence:
    """Launches whose kernels and grids depend only on a problem's signature.

    The first time, `launch` starts each kernel from tensors and tensor descriptors. If all of them can be reused, later
    calls start them from addresses, which replace tensors and descriptors, and no argument is inspected again. The
    caller must therefore keep shapes, dtypes and the alignment of addresses the same: they belong to the key of its
    plan.

        start, known = sequence.begin()
        start(kernel, grid, arguments, options)  # grid: a number, or (function, its arguments), called once
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
        # Only Triton's launcher calls hooks (a profiler's, for example): if there is a hook, nothing is replayed
        for hook in (_runtime.launch_enter_hook, _runtime.launch_exit_hook):
            if hook is not None and (hook.__class__ is not _HookChain or hook.calls):
                return _First(), False
        known, at = self.known, -1
        if known is None:
            return _First(), False
        stream, maps = self.stream(self.device), {}

        def start(kernel: Any, grid: Any, args: Any, options: Any) -> None:
            nonlocal at  # a plain closure variable: an iterator or an object would add a call to every launch
            at += 1
            run, programs, between, together, constants, described = known[at]
            if described:
                args = [*args]
                for index, fill, about, tail in described:  # last one first: replacing it moves the arguments after it
                    key = args[index], about
                    if key not in maps:  # a repair reads the same matrices as the launch before it
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
    """Records the launches of a sequence while they are started for the first time."""

    def __init__(self) -> None:
        self.started: list[Any] = []  # compiled kernels and their last arguments
        self.how: list[tuple[int, dict[int, Any]]] = []  # grid, and descriptors by their place among the arguments

    def __call__(self, kernel: Any, grid: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        programs = grid if isinstance(grid, int) else grid[0](*grid[1])
        self.how.append((programs, {k: x for k, x in enumerate(args) if isinstance(x, TensorDescriptor)}))
        self.started.append(launch(kernel, programs, *args, **options))


class _Known(NamedTuple):
    """Everything that is needed to start a kernel again."""

    run: Any
    programs: int
    between: tuple[Any, ...]  # arguments of `run` between the stream and the kernel's arguments
    together: bool  # True if `run` takes the kernel's arguments as one tuple
    constants: tuple[Any, ...]  # last arguments of the kernel, the same every time
    # For each descriptor: its place, the function that builds it from an address, the function's other arguments, and
    # kernel arguments to insert after it
    described: tuple[Any, ...]


class _Address(NamedTuple):
    """Stand-in for a tensor, with the two members that a tensor descriptor reads."""

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
    # The same call that CudaLauncher.__call__ makes for a kernel without scratch memory, minus six Python calls
    driver = triton.runtime.driver.active
    flags = run.launch_cooperative_grid, run.launch_pdl
    nothing = [None] * 5  # metadata for hooks, the two hooks, two scratch buffers
    between = function, *flags, metadata, *nothing, run.arg_annotations, run.kernel_signature
    # Like Triton's make_tensordesc_arg: a tensor map, the sizes and the strides take the place of a descriptor
    maps = []
    for (index, x), about in zip(descriptors.items(), abouts):
        shape, strides = tuple(x.shape), tuple(x.strides)
        element = about["elem_size"], _ELEMENTS[about["elem_type"]]
        made = about["swizzle"], *element, tuple(about["block_size"]), shape, strides, int(x.padding == "nan")
        maps.append((index, driver.utils.fill_tma_descriptor_tiled, made, (*shape, *strides)))
    return _Known(driver.utils.launch, programs, between, True, constants, tuple(reversed(maps)))
