"""Calls that are recorded or simulated (FakeTensorMode, meta, make_fx, export), and numbers that change in a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastclip
from support.accuracy import pairs

Call = Callable[[Tensor, Tensor, Tensor], Tensor]  # takes images, texts and labels


def every_statistic(image: Tensor, text: Tensor, y: Tensor) -> Tensor:
    found = fastclip.contrastive_stats(image, text, 5.0, image_labels=y, text_labels=y)
    return torch.stack([x.double().sum() for x in found]).sum() + 0.0 * image.sum()


CALLS: dict[str, Call] = {
    "pairs": lambda image, text, y: fastclip.contrastive_loss(image, text, 5.0),
    "labels": lambda image, text, y: fastclip.contrastive_loss(
        image, text, 5.0, image_labels=y, text_labels=y, exclude_self=True, label_smoothing=0.1
    ),
    "sigmoid": lambda image, text, y: fastclip.sigmoid_loss(image, text, 5.0, -5.0),
    "views": lambda image, text, y: fastclip.multiview_loss([image, text, image + text], 5.0, labels=y),
    "prefixes": lambda image, text, y: fastclip.matryoshka_loss(
        image, text, 5.0, prefixes=(3, 8), image_labels=y, text_labels=y
    ),
    "stats": every_statistic,
}


# Recording the longer calls takes seconds
FEW = [pytest.param(name, marks=[pytest.mark.full] if name in ("views", "prefixes", "stats") else []) for name in CALLS]


def inputs(N: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    image, text = pairs(N, N, 8)
    return image.clone().requires_grad_(), text.clone(), torch.arange(N) % 4


def with_gradient(call: Call) -> Callable[..., tuple[Tensor, Tensor]]:
    def both(image: Tensor, text: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        loss = call(image, text, y)
        return loss, torch.autograd.grad(loss, image)[0]

    return both


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_fake_tensors_have_shapes(name: str, autocast: bool) -> None:
    with FakeTensorMode() as mode, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss, gradient = with_gradient(CALLS[name])(*(mode.from_tensor(x) for x in inputs()))
    assert loss.shape == () and gradient.shape == (12, 8) and gradient.dtype == torch.float32


@pytest.mark.parametrize("name", CALLS)
def test_meta_tensors_have_shapes(name: str) -> None:
    image, text, y = (x.detach().to("meta") for x in inputs())
    loss, gradient = with_gradient(CALLS[name])(image.requires_grad_(), text, y)
    assert loss.is_meta and gradient.is_meta and gradient.shape == (12, 8)


@pytest.mark.parametrize("mode", [pytest.param("real", marks=pytest.mark.full), "symbolic"])
@pytest.mark.parametrize("name", FEW)
def test_recorded_graph_is_the_call(name: str, mode: str) -> None:
    call = with_gradient(CALLS[name])
    graph = make_fx(call, tracing_mode=mode)(*inputs())
    given = inputs(20 if mode == "symbolic" else 12)
    torch.testing.assert_close(graph(*given), call(*given))


@pytest.mark.parametrize("name", FEW)
def test_exported_program_is_the_call(name: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, image: Tensor, text: Tensor, y: Tensor) -> Tensor:
            return CALLS[name](image, text, y)

    image, text, y = inputs()
    program = torch.export.export(Module(), (image.detach(), text, y), strict=False)
    torch.testing.assert_close(program.module()(image.detach(), text, y), CALLS[name](image, text, y).detach())


CHANGING: dict[str, Callable[[float, Tensor, Tensor], Tensor]] = {
    "contrastive": lambda v, image, text: fastclip.contrastive_loss(
        image, text, 10 * v, image_weight=v, label_smoothing=v / 2
    ),
    "sigmoid": lambda v, image, text: fastclip.sigmoid_loss(image, text, 10 * v, -10 * v),
    "views": lambda v, image, text: fastclip.multiview_loss([image, text, text], 10 * v, image_weight=v),
    "prefixes": lambda v, image, text: fastclip.matryoshka_loss(image, text, 10 * v, prefixes=(3, 8), weights=(v, 1.0)),
    "stats": lambda v, image, text: fastclip.contrastive_stats(image, text, 10 * v).row_loss.mean() + image.sum(),
    "modules": lambda v, image, text: (
        fastclip.ClipLoss()(image, text, 10 * v) + fastclip.SigLipLoss()(image, text, 10 * v, -10 * v)
    ),
}
INTEGERS: dict[str, Callable[[int, Tensor, Tensor], Tensor]] = {
    "contrastive": lambda v, image, text: fastclip.contrastive_loss(image, text, v),
    "sigmoid": lambda v, image, text: fastclip.sigmoid_loss(image, text, v, -v),
}
OFTEN = [pytest.param(k, marks=[] if k in ("contrastive", "sigmoid") else [pytest.mark.full]) for k in CHANGING]


@pytest.mark.fault(
    "Scale, bias or weight is a Python number that changes at each step", "The function is compiled at most twice"
)
@pytest.mark.parametrize("name", OFTEN)
def test_changing_numbers_compile_twice_at_most(name: str) -> None:
    torch._dynamo.reset()
    counter: Any = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CHANGING[name], fullgraph=True, backend=counter)
    image, text, _ = inputs()
    for value in (0.1, 0.15, 0.7, 0.95):
        ours, theirs = (call(value, image, text) for call in (compiled, CHANGING[name]))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
        ours, theirs = (torch.autograd.grad(loss, image)[0] for loss in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", INTEGERS)
def test_changing_integers_compile(name: str) -> None:
    """Integers that change between calls compile. The second value makes the number symbolic, without a number's
    attributes.
    """
    torch._dynamo.reset()
    compiled = torch.compile(INTEGERS[name], fullgraph=True, backend="eager")
    image, text, _ = inputs()
    for value in (3, 5, 9):
        torch.testing.assert_close(compiled(value, image, text), INTEGERS[name](value, image, text))
