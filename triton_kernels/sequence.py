"""A fixed sequence of launches: of kernels that it knows the host does no more for each than Triton's own launcher."""

from __future__ import annotations

from typing import Any

import triton
from fastclip.triton_kernels.launch import (
    always_anew,
    cdiv,
    choose,
    launch,
    output_argument,
    processors,
    tile_arguments,
    tile_options,
    uses_descriptors,
)
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["Base", "Sequence", "TileLaunch"]

_runtime = triton.knobs.runtime
_new = object.__new__
_TRITON = triton.__version__.rpartition(".")[0]
_READ_LAUNCHERS = ("3.8",)  # releases of Triton whose CudaLauncher was read; others are started by its public call


class Base:
    """A tensor to which bytes are added, as they are to an address."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.size = x, x.element_size()

    def __add__(self, offset: int) -> Tensor:
        return self.x[offset // self.size :]


class Sequence:
    """Launches whose kernels and grids a problem's signature fixes.

    The first time each is started by `launch`, from tensors; afterwards as Triton itself ends, without a look at what
    the arguments are: tensors, or addresses as integers.

        start, known = sequence.begin()
        start(kernel, grid, arguments, options)  # grid: a number, or a function and its arguments for the first time
        if not known:
            sequence.keep(start)
    """

    def __init__(self, fixed: bool) -> None:
        self.fixed = fixed and not always_anew()
        self.known: list[Any] | None = None
        if self.fixed:
            driver = triton.runtime.driver.active
            self.device, self.stream = driver.get_current_device(), driver.get_current_stream

    def begin(self) -> tuple[Any, bool]:
        known, at = self.known, -1
        if known is None or _hooked(_runtime.launch_enter_hook) or _hooked(_runtime.launch_exit_hook):
            return _First(), False
        stream = self.stream(self.device)

        def start(kernel: Any, grid: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            nonlocal at
            at += 1
            run, programs, between, together, constants = known[at]
            if together:
                run(programs, 1, 1, stream, *between, (*args, *constants))
            else:
                run(programs, 1, 1, stream, *between, *args, *constants)

        return start, True

    def keep(self, first: _First) -> None:
        if self.fixed and None not in first.started:
            found = zip(first.started, first.grids)
            self.known = [_launcher(compiled, grid, constants) for (compiled, constants), grid in found]


def _launcher(compiled: Any, grid: int, constants: tuple[Any, ...]) -> tuple[Any, ...]:
    """What starts a kernel: a function, what comes before and after the stream, whether arguments are one tuple."""
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    no_scratch = not (getattr(run, "global_scratch_size", 1) or getattr(run, "profile_scratch_size", 1))
    if _TRITON in _READ_LAUNCHERS and type(run).__name__ == "CudaLauncher" and no_scratch and not run.gsan_enabled:
        # What CudaLauncher.__call__ comes to where a kernel asks for no memory: six Python calls less
        flags = run.launch_cooperative_grid, run.launch_pdl
        nothing = (None,) * 5  # metadata for hooks, hooks, memory
        return (
            run.launch,
            grid,
            (function, *flags, metadata, *nothing, run.arg_annotations, run.kernel_signature),
            True,
            constants,
        )
    return run, grid, (function, metadata, None, None, None), False, constants


class _First:
    """A sequence the first time."""

    def __init__(self) -> None:
        self.started: list[Any] = []
        self.grids: list[int] = []

    def __call__(self, kernel: Any, grid: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.grids.append(grid if isinstance(grid, int) else grid[0](*grid[1]))
        self.started.append(launch(kernel, self.grids[-1], *args, **options))


def _hooked(hook: Any) -> bool:
    """Whether somebody, such as a profiler, wants to be told of launches."""
    return hook is not None and bool(getattr(hook, "calls", True))


class TileLaunch:
    """What the launches of a tile kernel have in common, for features like `x` that it sees as (N, width)."""

    def __init__(
        self,
        kernel: Any,
        name: str,
        x: Tensor,
        N: int,
        width: int,
        strides: tuple[int, int],
        precision: str,
        flags: dict[str, Any],
    ) -> None:
        self.kernel, self.tile, self.strides = kernel, choose(name, x, False), strides
        self.descriptor = uses_descriptors(x)
        self.options = {**flags, **tile_options(self.tile, self.descriptor, width % self.tile.BLOCK_K == 0, precision)}
        self.most = processors(x.device) if name.endswith("_repair") else None  # programs: a repair's are persistent
        self.whole = self.shape(N, N)
        self.described: dict[str, dict[str, Any]] = {}

    def shape(self, M: int, N: int) -> tuple[int, int]:
        """Tile rows and tile columns."""
        return cdiv(M, self.tile.BLOCK_M), cdiv(N, self.tile.BLOCK_N)

    def tiles(self, M: int, N: int) -> int:
        rows, columns = self.shape(M, N)
        return rows * columns

    def programs(self, M: int, N: int) -> int:
        tiles = self.tiles(M, N)
        return tiles if self.most is None else min(tiles, self.most)

    def operands(self, image: Tensor, text: Tensor, known: bool) -> tuple[Any, ...]:
        """The kernel's first arguments, features and their strides; `known` as `Sequence.begin` says."""
        if not self.descriptor:
            return image, text, *self.strides
        if not known:
            found, _ = tile_arguments(self.tile, image, text)
            self.described.update(image=_but_base(found[0]), text=_but_base(found[1]))
            return found
        # Checks, and what follows from the shape, are of the first time
        a, b = _new(TensorDescriptor), _new(TensorDescriptor)
        a.__dict__, b.__dict__ = {**self.described["image"], "base": image}, {**self.described["text"], "base": text}
        return a, b, *self.strides

    def output(self, out: Tensor, known: bool) -> Any:
        """What the kernel writes its tiles to."""
        if not self.descriptor:
            return out
        if not known:
            found = output_argument(self.tile, out, out)
            self.described.update(out=_but_base(found))
            return found
        descriptor = _new(TensorDescriptor)
        descriptor.__dict__ = {**self.described["out"], "base": out}
        return descriptor


def _but_base(descriptor: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(descriptor).items() if name != "base"}
