"""Gradient caching: a step over a batch whose activations do not fit, with the one-shot step's gradients."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import get_device_states, set_device_states

__all__ = ["cached_step"]

_Forward = Callable[..., Sequence[Tensor]]


def cached_step(
    forward: _Forward,
    micro_batches: Iterable[Sequence[Any]],
    loss: Callable[..., Tensor],
    *,
    modules: Sequence[nn.Module] | None = None,
    keep_on: torch.device | str | None = None,
    grad_scaler: Any = None,
) -> Tensor:
    """Compute one loss's gradients over micro-batches with the activations of one (GradCache, Gao et al. 2021).

    All micro-batches are embedded without a graph; the loss of all features together is differentiated once, as far as
    the features; then every micro-batch is embedded again, with the random numbers of the first time, and
    back-propagated from its features' gradients. Gradients are added to ``.grad`` as by ``loss.backward()``; the caller
    zeroes, clips and steps. They are those of one pass over the whole batch, temperature included; two forward passes
    are their price.

        loss = cached_step(model, zip(images.split(64), ids.split(64)), lambda i, t, s: contrastive_loss(i, t, s))

    Args:
        forward: called as ``forward(*micro_batch)``, a model or a function. Returns the features first, each (size, D)
            of this micro-batch, two or more; then what the loss takes besides and is the same for every micro-batch,
            tensors (): the scale, already exponentiated, a bias. `DualEncoder` and open_clip's models are such.
        micro_batches: the arguments of each call; their sizes may differ.
        loss: called once, as ``loss(*all features, *the rest)``, features (N, D) in the order of the micro-batches.
            Returns a tensor (). With ``group=`` it is the loss over all ranks. Parameters of `modules` that it reads by
            itself, such as ``model.logit_scale``, get their gradients too, averaged by DistributedDataParallel; those
            of FSDP must come from `forward`. Nothing else that a pass leaves behind has a gradient here.
        modules: what `forward` runs; needed where it is a function around DistributedDataParallel or FSDP, whose
            gradients are exchanged in the last micro-batch only, around a model with buffers that a pass changes, or
            around one that draws random numbers on a GPU where the arguments are not.
            Default: `forward`, where it is a module.
        keep_on: the device where features wait and the loss is computed; default: where they are.
        grad_scaler: a ``torch.amp.GradScaler`` whose scale the gradients get.

    Returns:
        The loss, detached, not scaled.

    Raises:
        TypeError: a micro-batch is a tensor, a mapping or a text, no arguments.
        ValueError: no micro-batches; `forward` or `loss` returns something else; `loss` reads by itself a parameter
            that FSDP has sharded; a tensor of a micro-batch changed before it was embedded again.

    Dropout and drop path are the same in both passes: the states of torch's generators, of the CPU and of the GPUs that
    the arguments or the modules are on, are replayed, and go on after the loss; those of Python and numpy are not.
    Buffers are replayed as well and changed once. BatchNorm normalises with the statistics of a micro-batch, as in
    gradient accumulation: there, and only there, the gradients are not those of one pass over the whole batch. Under
    `torch.autocast` both passes are.
    """
    return _Passes(forward, micro_batches, modules).step(loss, keep_on, grad_scaler)


class _Passes:
    """Both passes of a step over the micro-batches; the second has the random numbers and buffers of the first."""

    def __init__(self, forward: _Forward, micro_batches: Iterable[Any], modules: Any) -> None:
        self._forward = forward
        self._batches = [_Arguments(batch) for batch in micro_batches]
        if not self._batches:
            raise ValueError("cached_step needs at least one micro-batch")
        if modules is None:
            modules = [forward] if isinstance(forward, nn.Module) else []
        self._modules: list[nn.Module] = [modules] if isinstance(modules, nn.Module) else list(modules)
        tensors = [x for batch in self._batches for x in batch.tensors]
        tensors += [p for module in self._modules for p in module.parameters()]
        self._places = [torch.empty(0, device=device) for device in {x.device for x in tensors}]
        self._states: list[tuple[Tensor, Any, Any]] = []  # of the generators, before each micro-batch
        self._buffers = _Buffers(self._modules)

    def step(self, loss: Callable[..., Tensor], keep_on: torch.device | str | None, grad_scaler: Any) -> Tensor:
        outputs = self._first()
        count = sum(x.dim() == 2 for x in outputs[0])
        device = outputs[0][0].device if keep_on is None else torch.device(keep_on)
        features = [torch.cat([of_batch[k].to(device) for of_batch in outputs]).requires_grad_() for k in range(count)]
        rest = [x.detach().to(device).requires_grad_(x.is_floating_point()) for x in outputs[0][count:]]
        sizes = [len(of_batch[0]) for of_batch in outputs]
        del outputs  # their memory is the loss's
        value = loss(*features, *rest)
        if not isinstance(value, Tensor) or value.dim() != 0:
            raise ValueError(f"loss must return a tensor (), got {_described(value)}")
        scaled = value if grad_scaler is None else grad_scaler.scale(value)
        direct = _backward(scaled, [*features, *rest], self._modules)
        self._second([None if x.grad is None else x.grad.split(sizes) for x in features], rest, direct)
        return value.detach()

    def _first(self) -> list[tuple[Tensor, ...]]:
        """Embed each micro-batch without a graph."""
        outputs = []
        with torch.no_grad(), _no_exchange(self._modules), self._buffers.noted():
            for batch in self._batches:
                self._states.append(_generators(self._places))
                outputs.append(_checked(self._forward(*batch.unchanged())))
        # older torch's autocast keeps the weights it has cast here, which know no gradient
        torch.clear_autocast_cache()
        return outputs

    def _second(self, gradients: list[Any], rest: list[Tensor], direct: list[tuple[Tensor, Tensor]]) -> None:
        """Back-propagate each micro-batch from its part of the features' `gradients`, the last one from `rest` too."""
        after = _generators(self._places)
        with self._buffers.replayed(), _restoring(after):
            for k, batch in enumerate(self._batches):
                last = k == len(self._batches) - 1
                _set_generators(self._states[k])
                with nullcontext() if last else _no_exchange(self._modules):
                    outputs = _checked(self._forward(*batch.unchanged()))
                    upstream = [None if d is None else d[k] for d in gradients]
                    if last:  # the scale and the bias are the same for all, and count once
                        upstream += [x.grad for x in rest]
                    pairs = [(x, d) for x, d in zip(outputs, upstream) if x.requires_grad and d is not None]
                    if last:
                        pairs += _before_last_pass(self._modules, direct)
                    if pairs:
                        torch.autograd.backward([x for x, _ in pairs], [d.to(x.device) for x, d in pairs])


def _backward(value: Tensor, inputs: list[Tensor], modules: Sequence[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """Differentiate the loss as far as its inputs; return the parameters that it reads by itself, with their gradients.

    Those belong to the last micro-batch's backward pass, the only one whose gradients DistributedDataParallel averages.
    """
    parameters: dict[Tensor, None] = dict.fromkeys(p for one in modules for p in one.parameters() if p.requires_grad)
    if not modules:  # whose they are is not known
        parameters = dict.fromkeys(x for x in _leaves(value) if all(x is not one for one in inputs))
    before = [(p, p.grad, [(hooks, dict(hooks)) for hooks in _hooks(p)]) for p in parameters]
    for p, _, all_hooks in before:
        p.grad = None
        for hooks, _ in all_hooks:
            hooks.clear()  # they see this gradient in that pass
    try:
        value.backward()
        direct = [(p, p.grad) for p in parameters if p.grad is not None]
    finally:
        for p, grad, all_hooks in before:
            p.grad = grad
            for hooks, kept in all_hooks:
                hooks.update(kept)
    for module in modules:
        _check_averaged(module, [p for p, _ in direct])
    return direct


def _hooks(p: Tensor) -> list[dict[int, Any]]:
    return [hooks for hooks in (p._backward_hooks, p._post_accumulate_grad_hooks) if hooks]


def _before_last_pass(modules: Sequence[nn.Module], direct: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Return what of `direct` enters the last pass; the gradients of others are put where that pass adds to them.

    A DistributedDataParallel that looks for unused parameters has counted these as such, and averages their ``.grad``.
    """
    looking = (
        one for module in modules for one in _exchanging(module) if getattr(one, "find_unused_parameters", False)
    )
    unused = dict.fromkeys(p for one in looking for p in one.parameters())
    for p, d in direct:
        if p in unused:
            p.grad = d if p.grad is None else p.grad + d
    return [(p, d) for p, d in direct if p not in unused]


def _check_averaged(module: nn.Module, direct: list[Tensor]) -> None:
    """Raise ValueError if what wraps the module averages only the gradients of what a forward uses."""
    if direct and any(getattr(one, "static_graph", False) for one in _exchanging(module)):
        raise ValueError(
            "loss reads a parameter by itself, which DistributedDataParallel(static_graph=True) does not expect: let "
            "forward return what loss needs of it, after the features"
        )
    sharded = {
        name: p
        for owner, one in module.named_modules()
        if hasattr(one, "set_requires_gradient_sync") or hasattr(one, "summon_full_params")  # FSDP2, FSDP
        for name, p in one.named_parameters(prefix=owner)
        if hasattr(p, "to_local") or hasattr(one, "summon_full_params")
    }
    for name, p in sharded.items():
        if any(p is one for one in direct):
            raise ValueError(
                f"loss reads the parameter {name}, which FSDP has sharded, by itself: its gradient would not be "
                "averaged over the ranks; let forward return what loss needs of it, after the features"
            )


def _leaves(value: Tensor) -> list[Tensor]:
    """Return the tensors that require gradients and that `value` was computed from."""
    leaves: list[Tensor] = []
    nodes, seen = [value.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [one for one, _ in node.next_functions]
            if type(node).__name__ == "AccumulateGrad":
                leaves.append(node.variable)  # type: ignore[attr-defined]
    return leaves


def _checked(outputs: Any) -> tuple[Tensor, ...]:
    """Return the features, and what comes after them; ValueError for anything else."""
    if isinstance(outputs, (tuple, list)) and all(isinstance(x, Tensor) for x in outputs):
        dims = [x.dim() for x in outputs]
        count = dims.count(2)
        if count >= 2 and dims == [2] * count + [0] * (len(dims) - count):
            return tuple(outputs)
    raise ValueError(
        f"forward must return features (size, D), two or more, and then tensors (), got {_described(outputs)}"
    )


def _described(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"a tensor {tuple(x.shape)}"
    return f"({', '.join(map(_described, x))})" if isinstance(x, (tuple, list)) else type(x).__name__


@contextmanager
def _no_exchange(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Keep DistributedDataParallel and FSDP from exchanging gradients inside."""
    with ExitStack() as stack:
        for module in modules:
            for one in _exchanging(module):
                stack.enter_context(_left_alone(one))
        yield


def _exchanging(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules that exchange gradients: `module`, or towers in it that are wrapped one by one."""
    if hasattr(module, "no_sync") or hasattr(module, "set_requires_gradient_sync"):
        yield module
        return
    for child in module.children():
        yield from _exchanging(child)


@contextmanager
def _left_alone(module: nn.Module) -> Iterator[None]:
    no_sync = getattr(module, "no_sync", None)  # DistributedDataParallel, FSDP
    switch = getattr(module, "set_requires_gradient_sync", None)  # FSDP2
    if switch is not None:
        switch(False)
    try:
        with nullcontext() if no_sync is None else no_sync():
            yield
    finally:
        if switch is not None:
            switch(True)


class _Arguments:
    """Arguments of one micro-batch, which nobody may change between the passes."""

    def __init__(self, batch: Any) -> None:
        if isinstance(batch, (Tensor, Mapping, str)):
            raise TypeError(
                "a micro-batch must be the arguments of forward, as in zip(images.split(64), ids.split(64)), got "
                f"{type(batch).__name__}; where forward takes that as it is, [(batch,) for batch in micro_batches]"
            )
        self._values = tuple(batch)
        self.tensors = [x for x in tree_leaves(self._values) if isinstance(x, Tensor)]
        self._versions = self._versions_now()

    def unchanged(self) -> tuple[Any, ...]:
        if self._versions_now() != self._versions:
            raise ValueError(
                "a tensor of a micro-batch has changed: cached_step reads each twice, and all are taken before the "
                "first is embedded; let forward change a copy, and give each micro-batch tensors of its own"
            )
        return self._values

    def _versions_now(self) -> list[int]:
        return [x._version for x in self.tensors if not x.is_inference()]


def _generators(places: Iterable[Tensor]) -> tuple[Tensor, Any, Any]:
    """Return the states of torch's generators, of the CPU and of the GPUs that these tensors are on."""
    return (torch.get_rng_state(), *get_device_states(*places))


def _set_generators(states: tuple[Tensor, Any, Any]) -> None:
    torch.set_rng_state(states[0])
    set_device_states(*states[1:])


@contextmanager
def _restoring(states: tuple[Tensor, Any, Any]) -> Iterator[None]:
    try:
        yield
    finally:
        _set_generators(states)


class _Buffers:
    """Running statistics and the like, which a second pass reads as the first did, and leaves as the first did.

    A module may write into a buffer or put another in its place.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        owners = dict.fromkeys(owner for module in modules for owner in module.modules())
        self._places = [(owner, name) for owner in owners for name in owner._buffers]
        self._first = self._now()

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note the buffers that the first pass begins with: DistributedDataParallel hands out those of rank 0."""
        inner = [getattr(one, "module", None) for module in self._modules for one in _exchanging(module)]
        note = self._note
        if "torch._dynamo" in sys.modules:  # loading it takes seconds; a graph of the wrapper would keep what this did
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
                else:  # DistributedDataParallel, for one, has hold of it
                    there.copy_(value)
