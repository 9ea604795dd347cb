"""Records of the kernels that the launchers of the GPU backends start, for tests of their work."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from fastclip._backends import cuda
from support.kinds import GPU

pytest.importorskip("triton")
from fastclip.triton_kernels import (
    contrastive_bwd,
    contrastive_bwd_vectors,
    contrastive_fwd,
    launch,
    planning,
    sequence,
)
from fastclip.triton_kernels.tile import CONSTANTS, REPAIR

if not GPU:
    from support import interpreter

    interpreter.replace_language_once()


def _flat(args: tuple[Any, ...]) -> list[Any]:
    return [x for arg in args for x in (_flat(arg) if isinstance(arg, tuple) else (arg,))]


class Launches:
    """The kernels launched, and the repairs requested. Kernels that repair tiles are named "exact", and tiles of the
    CUDA backend have the names of the equivalent Triton kernels.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.arguments: list[tuple[Any, ...]] = []
        self.constants: list[Tensor] = []
        real = launch.launch

        def watched(kernel: Any, grid: int, *args: Any, **options: Any) -> None:
            real(kernel, grid, *args, **options)
            repairs = "CONFIG" in options and options.get("EXACT", False)
            self.note(f"exact {kernel.fn.__name__}" if repairs else kernel.fn.__name__, args)

        for module in (contrastive_fwd, contrastive_bwd, contrastive_bwd_vectors, sequence):
            monkeypatch.setattr(module, "launch", watched)
        monkeypatch.setattr(planning, "plans", {})  # cached plans would bypass the watched launches
        for name in ("contrastive_fwd", "contrastive_bwd", "sigmoid_fwd"):
            monkeypatch.setattr(cuda._Tiles, name, self._watch(f"{name}_kernel", getattr(cuda._Tiles, name)))
        self._watch_native(monkeypatch)

    def _watch_native(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Watch the CUDA backend's losses of pairs, which launch their own kernels; their saved
        arrays begin with the constants.
        """
        fwd, bwd = cuda.plain_fwd, cuda.plain_bwd

        def watched_fwd(*args: Any) -> tuple[Tensor, Tensor]:
            loss, saved = fwd(*args)
            self.constants.append(saved[:CONSTANTS])
            return loss, saved

        def watched_bwd(*args: Any) -> tuple[Tensor | None, ...]:
            self.constants.append(args[3][:CONSTANTS])
            return bwd(*args)

        monkeypatch.setattr(cuda, "plain_fwd", watched_fwd)
        monkeypatch.setattr(cuda, "plain_bwd", watched_bwd)
        sigmoid = cuda.sigmoid_fwd

        def watched_sigmoid(*args: Any) -> tuple[Tensor | None, ...]:
            weigh = cuda._module.sigmoid_weights

            def watched_weights(*args: Any) -> None:
                weigh(*args)
                self.note("sigmoid_fwd_kernel", args)

            with monkeypatch.context() as patch:
                patch.setattr(cuda._module, "sigmoid_weights", watched_weights)
                return sigmoid(*args)

        monkeypatch.setattr(cuda, "sigmoid_fwd", watched_sigmoid)

    def _watch(self, name: str, method: Any) -> Any:
        def watched(tiles: Any, tile: Any, *args: Any) -> None:
            method(tiles, tile, *args)
            self.note(name, args)

        return watched

    def note(self, name: str, args: tuple[Any, ...]) -> None:
        self.names.append(name)
        self.arguments.append(args)
        if name.startswith("exact"):  # the first tensor of that size, because the rest of a slice may have it too
            self.constants.append(next(x for x in args if isinstance(x, Tensor) and x.shape == (CONSTANTS,)))

    def tensors(self, name: str) -> list[list[Tensor]]:
        """Return the tensors passed to every launch of a kernel, with a tensor descriptor as its tensor."""
        launches = (args for launched, args in zip(self.names, self.arguments) if launched == name)
        return [[x for x in (getattr(x, "base", x) for x in _flat(args)) if isinstance(x, Tensor)] for args in launches]

    @property
    def repaired(self) -> list[bool]:
        return [bool(x[REPAIR.value] != 0) for x in self.constants]
