"""Gradient caching: the gradients of a step over a batch whose activations do not fit into memory at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastclip.training.step.exchange import exchanging, no_exchange
from fastclip.training.step.replay import Arguments, Buffers, generators, restoring, set_generators

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
    keep_graphs: int = 0,
) -> Tensor:
    """Compute the gradients of a loss over all micro-batches with the activation memory of a single micro-batch.

    This is GradCache (Gao et al. 2021). First, all micro-batches are embedded without a graph. Second, the loss of all
    features together is differentiated once, with respect to the features. Third, each micro-batch is embedded again,
    with the same random numbers, and back-propagated from the gradients of its features. The result equals the
    gradients of a single pass over the whole batch, including that of the temperature, at the cost of a second forward
    pass, which `keep_graphs` saves for as many micro-batches as memory holds. Gradients are added to ``.grad``, as
    ``loss.backward()`` does. Zeroing gradients, clipping them and stepping the optimiser are left to the caller.

        loss = cached_step(model, zip(images.split(64), ids.split(64)), lambda i, t, s: contrastive_loss(i, t, s))

    Args:
        forward: model or function, called as ``forward(*micro_batch)``. It returns two or more features of the
            micro-batch, each (size, D), followed by the other inputs of the loss, which are scalar tensors and the
            same for every micro-batch: the scale, already exponentiated, and a bias. `DualEncoder` and open_clip's
            models have this form.
        micro_batches: arguments of each call of `forward`. The sizes of micro-batches may differ.
        loss: function that is called once, as ``loss(*all features, *the rest)``, with features (N, D) in the order of
            the micro-batches. It returns a scalar tensor. With ``group=`` it is the loss over all ranks. Parameters of
            `modules` that it reads directly, such as ``model.logit_scale``, get gradients too, which
            DistributedDataParallel averages. If FSDP has sharded a parameter, `forward` must return its value instead.
            Other tensors that `forward` stores and `loss` reads, such as an attribute of the model, get no gradient.
        modules: modules that `forward` runs (default: `forward` itself, if it is a module). If `forward` is a function
            that calls a module, the module must be given in three cases. First, it is wrapped in
            DistributedDataParallel or FSDP, whose gradients are exchanged in the last micro-batch only. Second, a
            forward pass changes its buffers. Third, it draws random numbers on a GPU that holds none of the arguments.
        keep_on: device on which features are stored and the loss is computed (default: the features' device).
        grad_scaler: ``torch.amp.GradScaler`` by whose scale the gradients are multiplied.
        keep_graphs: number of micro-batches, counted from the first, whose activations stay in memory after the first
            pass, so that they are embedded only once. The gradients are the same bit for bit. If a module exchanges
            gradients (DistributedDataParallel, FSDP), the last micro-batch is always embedded again, and all ranks must
            keep the same number of graphs.

    Returns:
        The loss (), detached and not scaled.

    Raises:
        TypeError: a micro-batch is a tensor, a mapping or a string instead of a sequence of arguments.
        ValueError: there are no micro-batches, `keep_graphs` is negative, `forward` or `loss` returns something other
            than what is described above, `loss` directly reads a parameter that FSDP has sharded, or a tensor of a
            micro-batch has changed.

    Dropout and drop path draw the same masks in both passes: torch's generators of the CPU and of all GPUs on which
    arguments or modules are located are replayed. Then they are set to the state that they had after the loss. The
    generators of Python and numpy are not replayed. Buffers are replayed, too, and change only once. BatchNorm
    normalises with the statistics of a micro-batch, as in gradient accumulation, and is the only layer with which the
    gradients differ from those of a single pass over the whole batch. `torch.autocast` around the call applies to both
    passes.
    """
    if keep_graphs < 0:
        raise ValueError(f"keep_graphs must be at least 0, got {keep_graphs}")
    return _Passes(forward, micro_batches, modules, keep_graphs).step(loss, keep_on, grad_scaler)


class _Passes:
    """The two passes of a step over its micro-batches. The second replays random numbers and buffers of the first."""

    def __init__(self, forward: _Forward, micro_batches: Iterable[Any], modules: Any, keep_graphs: int) -> None:
        self._forward = forward
        self._batches = [Arguments(batch) for batch in micro_batches]
        if not self._batches:
            raise ValueError("cached_step needs at least one micro-batch")
        if modules is None:
            modules = [forward] if isinstance(forward, nn.Module) else []
        self._modules: list[nn.Module] = [modules] if isinstance(modules, nn.Module) else list(modules)
        # Modules prepare the exchange of gradients in the forward pass that precedes the exchange
        exchanges = any(True for module in self._modules for _ in exchanging(module))
        self._kept = min(keep_graphs, len(self._batches) - exchanges)  # the first micro-batches keep their graphs
        self._graphs: list[tuple[Tensor, ...]] = []  # outputs of these micro-batches
        tensors = [x for batch in self._batches for x in batch.tensors]
        tensors += [p for module in self._modules for p in module.parameters()]
        self._places = [torch.empty(0, device=device) for device in {x.device for x in tensors}]
        self._states: list[tuple[Tensor, Any, Any]] = []  # states of the generators before each micro-batch
        self._buffers = Buffers(self._modules)

    def step(self, loss: Callable[..., Tensor], keep_on: torch.device | str | None, grad_scaler: Any) -> Tensor:
        outputs = self._first()
        count = sum(x.dim() == 2 for x in outputs[0])
        device = outputs[0][0].device if keep_on is None else torch.device(keep_on)
        features = [torch.cat([of_batch[k].to(device) for of_batch in outputs]).requires_grad_() for k in range(count)]
        rest = [x.detach().to(device).requires_grad_(x.is_floating_point()) for x in outputs[0][count:]]
        sizes = [len(of_batch[0]) for of_batch in outputs]
        del outputs  # frees their memory for the loss
        value = loss(*features, *rest)
        if not isinstance(value, Tensor) or value.dim() != 0:
            raise ValueError(f"loss must return a scalar tensor, got {_described(value)}")
        scaled = value if grad_scaler is None else grad_scaler.scale(value)
        direct = _backward(scaled, [*features, *rest], self._modules)
        self._second([None if x.grad is None else x.grad.split(sizes) for x in features], rest, direct)
        return value.detach()

    def _first(self) -> list[tuple[Tensor, ...]]:
        """Return the outputs of `forward` for each micro-batch, without a graph; `_graphs` keeps those of the first."""
        with no_exchange(self._modules):
            for batch in self._batches[: self._kept]:
                self._graphs.append(_checked(self._forward(*batch.unchanged())))
        outputs = [tuple(x.detach() for x in of_batch) for of_batch in self._graphs]
        with torch.no_grad(), no_exchange(self._modules), self._buffers.noted():
            for batch in self._batches[self._kept :]:
                self._states.append(generators(self._places))
                outputs.append(_checked(self._forward(*batch.unchanged())))
        # Under no_grad, older versions of torch's autocast cache casts of the weights that have no graph; the second
        # pass would reuse them and the weights would get no gradient
        torch.clear_autocast_cache()
        return outputs

    def _second(self, gradients: list[Any], rest: list[Tensor], direct: list[tuple[Tensor, Tensor]]) -> None:
        """Back-propagate each micro-batch from its part of the features' `gradients`, and the last also from `rest`."""
        after = generators(self._places)  # the state after the loss, which may have drawn random numbers, too
        self._graphs.reverse()
        with self._buffers.replayed(), restoring(after):
            for k, batch in enumerate(self._batches):
                last = k == len(self._batches) - 1
                with nullcontext() if last else no_exchange(self._modules):
                    if self._graphs:
                        outputs = self._graphs.pop()  # freed by its backward pass
                    else:
                        set_generators(self._states[k - self._kept])
                        outputs = _checked(self._forward(*batch.unchanged()))
                    upstream = [None if d is None else d[k] for d in gradients]
                    if last:  # the scale and the bias are shared by all micro-batches, so their gradients count once
                        upstream += [x.grad for x in rest]
                    pairs = [(x, d) for x, d in zip(outputs, upstream) if x.requires_grad and d is not None]
                    if last:
                        pairs += _before_last_pass(self._modules, direct)
                    if pairs:
                        torch.autograd.backward([x for x, _ in pairs], [d.to(x.device) for x, d in pairs])


def _backward(value: Tensor, inputs: list[Tensor], modules: Sequence[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """Differentiate the loss with respect to its inputs, and return the parameters it reads directly with gradients.

    The gradients of these parameters enter the backward pass of the last micro-batch, which is the only one whose
    gradients DistributedDataParallel averages.
    """
    parameters: dict[Tensor, None] = dict.fromkeys(p for one in modules for p in one.parameters() if p.requires_grad)
    if not modules:  # unknown modules: take all leaves of the loss's graph
        parameters = dict.fromkeys(x for x in _leaves(value) if all(x is not one for one in inputs))
    before = [(p, p.grad, [(hooks, dict(hooks)) for hooks in _hooks(p)]) for p in parameters]
    for p, _, all_hooks in before:
        p.grad = None
        for hooks, _ in all_hooks:
            hooks.clear()  # hooks are called with this gradient in the last micro-batch's pass
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
    """Return the entries of `direct` that are passed to the last backward pass, and add the others to ``.grad``.

    With ``find_unused_parameters``, DistributedDataParallel has already marked as ready the parameters that `forward`
    does not use, and averages their ``.grad``. A gradient that autograd delivers for them later would be an error.
    """
    looking = (one for module in modules for one in exchanging(module) if getattr(one, "find_unused_parameters", False))
    unused = dict.fromkeys(p for one in looking for p in one.parameters())
    for p, d in direct:
        if p in unused:
            p.grad = d if p.grad is None else p.grad + d
    return [(p, d) for p, d in direct if p not in unused]


def _check_averaged(module: nn.Module, direct: list[Tensor]) -> None:
    """Raise ValueError if the wrapper of `module` would not average the gradients of the parameters in `direct`."""
    if direct and any(getattr(one, "static_graph", False) for one in exchanging(module)):
        raise ValueError(
            "loss reads a parameter directly, which DistributedDataParallel(static_graph=True) does not support: let "
            "forward return the value that loss needs, after the features"
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
                f"loss directly reads the parameter {name}, which FSDP has sharded, so its gradient would not be "
                "averaged over the ranks: let forward return the value that loss needs, after the features"
            )


def _leaves(value: Tensor) -> list[Tensor]:
    """Return the leaf tensors that require gradients and from which `value` was computed."""
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
    """Return the outputs of `forward` as a tuple. Raise ValueError unless they are features and then tensors ()."""
    if isinstance(outputs, (tuple, list)) and all(isinstance(x, Tensor) for x in outputs):
        dims = [x.dim() for x in outputs]
        count = dims.count(2)
        if count >= 2 and dims == [2] * count + [0] * (len(dims) - count):
            return tuple(outputs)
    raise ValueError(
        f"forward must return two or more features (size, D), followed by tensors (), got {_described(outputs)}"
    )


def _described(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"a tensor {tuple(x.shape)}"
    return f"({', '.join(map(_described, x))})" if isinstance(x, (tuple, list)) else type(x).__name__
