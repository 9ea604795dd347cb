"""Arguments, random numbers and buffers, which the second pass of gradient caching must find as the first did."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import get_device_states, set_device_states

from fastclip.training.step.exchange import exchanging

__all__ = ["Arguments", "Buffers", "generators", "restoring", "set_generators"]


class Arguments:
    """Arguments of one micro-batch. They may not change between the passes, which `unchanged` checks."""

    def __init__(self, batch: Any) -> None:
        if isinstance(batch, (Tensor, Mapping, str)):
            raise TypeError(
                "a micro-batch must be the arguments of forward, as in zip(images.split(64), ids.split(64)), got "
                f"{type(batch).__name__}. If forward takes one argument, pass [(batch,) for batch in micro_batches]"
            )
        self._values = tuple(batch)
        self.tensors = [x for x in tree_leaves(self._values) if isinstance(x, Tensor)]
        self._versions = self._versions_now()

    def unchanged(self) -> tuple[Any, ...]:
        if self._versions_now() != self._versions:
            raise ValueError(
                "a tensor of a micro-batch has changed: cached_step collects all micro-batches first and reads each of "
                "them twice. Let forward change a copy, and do not reuse tensors between micro-batches"
            )
        return self._values

    def _versions_now(self) -> list[int]:
        return [x._version for x in self.tensors if not x.is_inference()]


def generators(places: Iterable[Tensor]) -> tuple[Tensor, Any, Any]:
    """Return the states of torch's generators of the CPU and of the GPUs on which the tensors `places` are."""
    return (torch.get_rng_state(), *get_device_states(*places))


def set_generators(states: tuple[Tensor, Any, Any]) -> None:
    torch.set_rng_state(states[0])
    set_device_states(*states[1:])


@contextmanager
def restoring(states: tuple[Tensor, Any, Any]) -> Iterator[None]:
    try:
        yield
    finally:
        set_generators(states)


class Buffers:
    """Buffers such as running statistics.

    The second pass must find the buffers as the first pass found them, and leave them as the first pass left them.
    Between the passes a module may have written into a buffer or replaced it by another tensor.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        owners = dict.fromkeys(owner for module in modules for owner in module.modules())
        self._places = [(owner, name) for owner in owners for name in owner._buffers]

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Record the buffers as the first micro-batch inside the context finds them, which the second pass repeats.

        DistributedDataParallel sends those of rank 0 in the first forward pass of a step.
        """
        self._first = self._now()
        inner = [getattr(one, "module", None) for module in self._modules for one in exchanging(module)]
        note = self._note
        # A compiled graph of the wrapper must not contain this hook. torch.compiler loads dynamo, which takes seconds
        if "torch._dynamo" in sys.modules:
            note = torch.compiler.disable(note)
        handles = [one.register_forward_pre_hook(note) for one in inner if isinstance(one, nn.Module)]
        self._awaited = {*inner}
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def replayed(self) -> Iterator[None]:
        after = self._now()
        self._write(self._first)
        try:
            yield
        finally:
            self._write(after)

    def _note(self, module: nn.Module, args: Any) -> None:
        if module in self._awaited:
            self._awaited.remove(module)
            inside = {*module.modules()}
            now = zip(self._places, self._now(), self._first)
            self._first = [new if owner in inside else old for (owner, _), new, old in now]

    def _now(self) -> list[Tensor | None]:
        buffers = (owner._buffers.get(name) for owner, name in self._places)
        return [None if x is None else x.clone() for x in buffers]

    def _write(self, values: list[Tensor | None]) -> None:
        with torch.no_grad():
            for (owner, name), value in zip(self._places, values):
                there = owner._buffers.get(name)
                if there is None or value is None or (there.shape, there.dtype) != (value.shape, value.dtype):
                    owner._buffers[name] = None if value is None else value.clone()
                else:
                    # In place, because DistributedDataParallel, for example, refers to this tensor. Through .data,
                    # because BatchNorm's graph saves its running statistics, although a backward pass in training
                    # does not read them, and would refuse a change of their version.
                    there.data.copy_(value)
