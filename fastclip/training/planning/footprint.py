"""Memory of a forward and a backward pass, measured by running them on tensors that have sizes but no contents."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastclip.models.dual_encoder import DualEncoder

__all__ = ["Footprint", "Moment", "embedding_moments", "footprint", "rough_footprint", "start_autograd"]

_PAIRS = (16, 32)  # any two numbers: the size of each tensor is affine in the number of pairs
_ROUGH_PAIRS = 2  # BatchNorm refuses a single pair
_ROUGH = 3  # how many times the bytes that autograd saves a pass takes at most, with all temporary tensors


class Moment(NamedTuple):
    """Live bytes after an operation."""

    fixed: int  # bytes that do not depend on the number of pairs
    pair: int  # bytes per pair
    gradients: int  # bytes of the parameters' gradients that were computed by then


@dataclass(frozen=True)
class Footprint:
    """Bytes that the forward and backward pass of the towers take for any number of pairs.

    They include activations, all temporary tensors, the features, autocast's copies of the weights, and the gradient
    of a weight until it is added to ``.grad``. They exclude parameters, their ``.grad``, inputs and the gradients of
    the features.
    """

    moments: tuple[Moment, ...] = field(repr=False)
    between: Moment  # after the forward pass, before the backward pass
    measure_embedding: Callable[[], tuple[Moment, ...]] = field(repr=False, compare=False)  # returns `embedding`
    dim: int  # D of the features
    feature_size: int  # bytes of an element

    @cached_property
    def embedding(self) -> tuple[Moment, ...]:
        """Moments of a forward pass without a graph, measured on first use: only plans with kept graphs need them."""
        return self.measure_embedding()

    def peak(self, pairs: int, share: float = 0.0) -> int:
        """Return the peak in bytes.

        Args:
            pairs: number of pairs.
            share: fraction of the bytes of each parameter's gradient to count, from the moment at which the gradient is
                computed.
        """
        return max(m.fixed + pairs * m.pair + int(share * m.gradients) for m in self.moments)

    def embedding_peak(self, pairs: int) -> int:
        """Return the peak in bytes of a forward pass without a graph."""
        return max(m.fixed + pairs * m.pair for m in self.embedding)

    def kept(self, pairs: int) -> int:
        """Return the bytes kept after the forward pass until the gradients of the features are known."""
        return self.between.fixed + pairs * self.between.pair


def footprint(
    model: DualEncoder, *, image_size: int, context_length: int, precision: str = "fp32", device: str = "cuda"
) -> Footprint:
    """Measure the memory of one step of `model` in training mode, without allocating its tensors.

    The model is measured with its current gradient checkpointing and frozen parameters. The step runs for two
    numbers of pairs, with the same operations on tensors of different sizes. The bytes after each operation are
    therefore known for every number of pairs, and the peak is exact, although a different operation may reach it for
    other numbers.

    Args:
        model: model on any device, including "meta". It is left unchanged.
        image_size: side of the square images, in pixels.
        context_length: tokens per text.
        precision: "fp32", or "bf16" for autocast.
        device: "cpu" or "cuda". For "cuda", attention and dropout save the tensors that a GPU's kernels would save. In
            both cases the operations run on the CPU, because autograd cannot run a backward pass on a GPU that does
            not exist. Scratch memory inside kernels is not counted.

    Raises:
        ValueError: the operations depend on the number of pairs.
    """
    start_autograd()
    sizes = (image_size, context_length, precision, device)
    small, large = (_run(model, pairs, *sizes) for pairs in _PAIRS)
    image = small.features[0]
    between = _moment(small.between, large.between)
    embedding = partial(_embedding, model, *sizes)
    return Footprint(_moments(small, large), between, embedding, image.shape[1], image.element_size())


def start_autograd() -> None:
    """Run a backward pass on the CPU alone, so that fake devices start no threads.

    Autograd's first backward pass in a process starts a thread for each device it knows, and after that a forked
    process cannot run a backward pass.
    """
    torch.zeros(1, requires_grad=True).sum().backward()


def embedding_moments(model: DualEncoder, *sizes: Any) -> tuple[tuple[Moment, ...], int]:
    """Return the moments of a forward pass without a graph, and the bytes of an element of the features.

    Args:
        model: model on any device. It is left unchanged.
        sizes: image_size, context_length, precision and device, as for `footprint`.
    """
    start_autograd()
    small, large = (_run(model, pairs, *sizes, grad=False) for pairs in _PAIRS)
    return _moments(small, large), small.features[0].element_size()


def _embedding(model: DualEncoder, *sizes: Any) -> tuple[Moment, ...]:
    return embedding_moments(model, *sizes)[0]


def _moments(small: _Run, large: _Run) -> tuple[Moment, ...]:
    """Return the moments of a step that can be the peak, from its runs for both numbers of `_PAIRS`."""
    if len(small.history) != len(large.history):
        raise ValueError(
            f"the model runs other operations for {_PAIRS[1]} pairs than for {_PAIRS[0]}: its memory cannot be planned"
        )
    return _highest([_moment(*both) for both in zip(small.history, large.history)])


def rough_footprint(model: DualEncoder, *, image_size: int, context_length: int) -> Footprint:
    """Return a footprint that no step of `model` exceeds, from the tensors that one forward pass saves.

    This takes a tenth of the time of `footprint`. A step for which there is room by this bound needs no exact plan.
    The bound also holds for bf16, gradient checkpointing and passes without a graph, which take less.

    Args:
        model: model on any device, without gradient checkpointing. It is left unchanged.
        image_size, context_length: as in `footprint`.
    """
    start_autograd()
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        saved[storage._cdata] = storage  # kept, so that no other storage gets the same number
        return x

    with FakeTensorMode(allow_non_fake_inputs=True), _training(model):
        weights = {name: torch.empty(p.shape, requires_grad=p.requires_grad) for name, p in model.named_parameters()}
        weights |= {name: torch.empty(x.shape, dtype=x.dtype) for name, x in model.named_buffers()}
        images = torch.empty(_ROUGH_PAIRS, 3, image_size, image_size)
        ids = torch.empty(_ROUGH_PAIRS, context_length, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            features = torch.func.functional_call(model, weights, (images, ids), {"normalize": False})[0]
        known = {x.untyped_storage()._cdata for x in weights.values()}
        total = sum(storage.nbytes() for key, storage in saved.items() if key not in known)
    parameters = 4 * sum(p.numel() for p in model.parameters())  # casts, and gradients that are not yet in `.grad`
    most = Moment(2 * parameters, _ROUGH * total // _ROUGH_PAIRS, parameters)
    return Footprint((most,), most, lambda: (most,), features.shape[1], features.element_size())


def _moment(small: tuple[int, int], large: tuple[int, int]) -> Moment:
    pair = (large[0] - small[0]) // (_PAIRS[1] - _PAIRS[0])
    return Moment(small[0] - _PAIRS[0] * pair, pair, small[1])


def _highest(moments: list[Moment]) -> tuple[Moment, ...]:
    """Return the moments that can be the peak for some number of pairs.

    A moment is left out if another one, with equal bytes of gradients, is at least as large for every number of pairs.
    """
    highest: dict[int, list[Moment]] = {}  # bytes of gradients -> moments
    for m in sorted(moments, key=lambda m: (m.pair, m.fixed), reverse=True):
        moments_alike = highest.setdefault(m.gradients, [])
        if not moments_alike or m.fixed > moments_alike[-1].fixed:
            moments_alike.append(m)
    return tuple(m for moments_alike in highest.values() for m in moments_alike)


class _Live(TorchDispatchMode):
    """Count of the bytes in storages that operations created and that Python or autograd still refers to.

    Args:
        known: tensors whose storages do not count.
        gradients: tensors whose storages do not count either, but for which the first addition is recorded.
    """

    def __init__(self, known: list[Tensor], gradients: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self.arrived = 0  # bytes of `gradients` that were added to so far
        self.history: list[tuple[int, int]] = []  # (bytes, arrived) after each operation
        self._sizes: dict[int, int] = {}
        self._known = {id(storage): storage for x in [*known, *gradients] if (storage := x.untyped_storage())}
        self._awaited = {id(x.untyped_storage()) for x in gradients}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        storages = [x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor)]
        for storage in storages:
            self._add(storage)
        self.history.append((self.bytes, self.arrived))
        # Counted after `history`, because the tensor that was added is in `bytes` now and freed by the next operation
        for storage in storages:
            if id(storage) in self._awaited:
                self._awaited.remove(id(storage))
                self.arrived += storage.nbytes()
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key not in self._sizes and key not in self._known:
            self._sizes[key] = storage.nbytes()
            self.bytes += storage.nbytes()
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key)


class _Step(nn.Module):
    """Forward and backward pass in a single call.

    `functional_call` replaces the parameters only for the duration of a call, but checkpointed blocks run again in the
    backward pass and must find the replaced parameters there.
    """

    features: tuple[Tensor, Tensor]  # kept, as the trainer keeps them
    between: tuple[int, int]  # entry of `_Live.history` between the passes

    def __init__(self, model: DualEncoder, precision: str) -> None:
        super().__init__()
        self.model = model
        self.precision = precision

    def forward(self, images: Tensor, ids: Tensor, live: _Live) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            features = self.model.encode_image(images), self.model.encode_text(ids)
        self.between = live.bytes, live.arrived
        self.features = features[0].detach(), features[1].detach()
        with_gradient = [x for x in features if x.requires_grad]
        if with_gradient:
            gradients = tuple(x.new_zeros(()).expand_as(x) for x in with_gradient)
            # torch.autograd.backward would leave the mode `_GPU`, which checkpointed blocks need when they run again
            torch.autograd.Variable._execution_engine.run_backward(
                tuple(with_gradient), gradients, False, False, (), allow_unreachable=True, accumulate_grad=True
            )


class _Run(NamedTuple):
    history: list[tuple[int, int]]
    between: tuple[int, int]
    features: tuple[Tensor, Tensor]


def _run(
    model: DualEncoder,
    pairs: int,
    image_size: int,
    context_length: int,
    precision: str,
    device: str,
    *,
    grad: bool = True,
) -> _Run:
    step = _Step(model, precision)
    with FakeTensorMode(allow_non_fake_inputs=True), _training(model):
        weights = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in step.named_parameters()}
        buffers = {name: torch.empty(x.shape, dtype=x.dtype) for name, x in step.named_buffers()}
        for name, p in step.named_parameters():
            if p.requires_grad:
                weights[name].requires_grad_().grad = torch.empty(p.shape, dtype=p.dtype)  # autograd adds to it
        images = torch.empty(pairs, 3, image_size, image_size)
        ids = torch.empty(pairs, context_length, dtype=torch.int64)
        gradients = [x.grad for x in weights.values() if x.grad is not None]
        live = _Live([*weights.values(), *buffers.values(), images, ids], gradients)
        with _GPU() if device == "cuda" else nullcontext(), torch.set_grad_enabled(grad), live:
            torch.func.functional_call(step, {**weights, **buffers}, (images, ids, live))
    return _Run(live.history, step.between, step.features)


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    was = model.training
    model.train()
    try:
        yield
    finally:
        model.train(was)


class _GPU(TorchFunctionMode):
    """Replacement of attention and dropout on the CPU by operations that save what a GPU's kernels save.

    A GPU's attention saves no tensor of the size of the attention matrix, with any mask, bias and dropout, while the
    CPU's does for some of them. A GPU's dropout saves a mask of one byte per element.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        if func is F.dropout:
            return _dropout(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    if torch.is_autocast_enabled("cpu"):  # autocast does not know the op used below
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    if attn_mask is not None:
        shape = *query.shape[:-1], key.shape[-2]
        attn_mask = attn_mask.to(query.dtype).expand(shape)
    memory_efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    saves = any(x.requires_grad for x in (query, key, value))
    return memory_efficient(query, key, value, attn_mask, saves, dropout_p, is_causal, scale=options.get("scale"))[0]


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input
