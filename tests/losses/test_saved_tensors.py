"""The time between forward and backward: checkpoints, saved-tensor hooks, tensors that change meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastclip
from fastclip.distributed import before_group
from support.accuracy import leaves, pairs

LABELS = {"image_labels": torch.arange(20) % 7, "text_labels": torch.arange(20) * 3 % 7}
LOSSES: dict[str, Callable[..., Tensor]] = {
    "contrastive": fastclip.contrastive_loss,
    "labels": lambda *x, **options: fastclip.contrastive_loss(*x, label_smoothing=0.1, **LABELS, **options),
    "sigmoid": lambda image, text, s, **options: fastclip.sigmoid_loss(image, text, s, s - 15.0, **options),
}


def given(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return leaves(*(x.to(dtype) for x in pairs(20, 20, 8)), 5.0)


def anew(x: Tensor) -> Tensor:
    return x.detach().clone()


def reentrant(loss: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    return checkpoint(loss, *inputs, use_reentrant=True)


def not_reentrant(loss: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    return checkpoint(loss, *inputs, use_reentrant=False)


def on_cpu(loss: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return loss(*inputs)


def hooked(loss: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(anew, anew):
        return loss(*inputs)


WAYS = [reentrant, not_reentrant, on_cpu, hooked]


def assert_same_gradients(loss: Callable[..., Tensor], way: Callable[..., Tensor]) -> None:
    inputs, others = given(), given()
    loss(*inputs).backward()
    way(loss, *others).backward()
    for x, y in zip(inputs, others):
        assert torch.equal(x.grad, y.grad)


@pytest.mark.fault(
    "Activation checkpointing or saved-tensor hooks are used", "The gradients are unchanged, bit for bit"
)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LOSSES)
def test_checkpoints_and_hooks_change_nothing(name: str, way: Callable[..., Tensor]) -> None:
    assert_same_gradients(LOSSES[name], way)


@pytest.mark.parametrize("way", [not_reentrant, hooked])
@pytest.mark.parametrize("name", LOSSES)
def test_second_derivatives_in_a_checkpoint(name: str, way: Callable[..., Tensor]) -> None:
    results = []
    for of in (way, lambda loss, *inputs: loss(*inputs)):
        image, text, scale = given(torch.float64)
        (gradient,) = torch.autograd.grad(of(LOSSES[name], image, text, scale), image, create_graph=True)
        gradient.square().sum().backward()
        results.append((image.grad, scale.grad))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)


@pytest.fixture
def group() -> Iterator[Any]:
    """Process group of this process alone."""
    before_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("way", WAYS)
def test_checkpoints_and_hooks_change_nothing_of_shards(way: Callable[..., Tensor], group: Any) -> None:
    for loss in LOSSES.values():
        for comm in ("gather", "ring"):

            def sharded(*x: Tensor, loss: Callable[..., Tensor] = loss, comm: str = comm) -> Tensor:
                return loss(*x, group=group, comm=comm)

            assert_same_gradients(sharded, way)


@pytest.mark.fault(
    "Features change between forward and backward", "backward raises an error, as torch's own operations do"
)
@pytest.mark.parametrize("changed", [0, 1, 2], ids=["image", "text", "scale"])
@pytest.mark.parametrize("name", LOSSES)
def test_change_between_forward_and_backward_raises(name: str, changed: int) -> None:
    """A change of the features between forward and backward raises, as with torch's own operations. The gradient would
    otherwise be that of other features.
    """
    inputs = given()
    loss = LOSSES[name](*inputs)
    with torch.no_grad():
        inputs[changed].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
