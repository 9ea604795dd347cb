"""A model, its batches and its losses for gradient caching, and the step that keeps every graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastclip

N, SIZES = 22, (8, 8, 5, 1)


class Pair(nn.Module):
    """Two encoders with dropout between their layers, and the scalars of the losses."""

    def __init__(self, dropout: float = 0.0, norm: bool = False, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def tower() -> nn.Sequential:
            middle = nn.BatchNorm1d(16) if norm else nn.GELU()
            return nn.Sequential(nn.Linear(7, 16), middle, nn.Dropout(dropout), nn.Linear(16, 6))

        self.image, self.text = tower(), tower()
        self.log_scale, self.bias = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor(-2.0))
        with torch.no_grad():
            for p in (*self.image.parameters(), *self.text.parameters()):
                p.copy_(0.5 * torch.randn(p.shape, generator=generator))
        self.to(dtype)

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        return self.image(images), self.text(texts), self.log_scale.exp(), self.bias


class Towers(Pair):
    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        return self.image(images), self.text(texts)


def rows(dtype: torch.dtype = torch.float64, size: int = N) -> tuple[Tensor, Tensor]:
    return torch.randn(2, size, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype).unbind(0)


def clip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return fastclip.contrastive_loss(image, text, scale)


def unicl(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    y = torch.arange(len(image)) % 9
    return fastclip.contrastive_loss(image, text, scale, image_labels=y, text_labels=y, label_smoothing=0.1)


def sigmoid(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return fastclip.sigmoid_loss(image, text, scale, bias)


def gradients(model: nn.Module, step: Callable[[nn.Module], Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    model = copy.deepcopy(model)
    value = step(model)
    return value, [p.grad for p in model.parameters()]


def kept_whole(loss: Callable[..., Tensor], batches: Sequence[Sequence[Tensor]]) -> Callable[[nn.Module], Tensor]:
    """Return a step that keeps the graphs of all micro-batches, which the cached step avoids."""

    def step(model: nn.Module) -> Tensor:
        outputs = [model(*batch) for batch in batches]
        value = loss(*(torch.cat([x[k] for x in outputs]) for k in range(2)), *outputs[-1][2:])
        value.backward()
        return value.detach()

    return step


def assert_same(ours: Any, true: Any, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(ours[0], true[0], rtol=rtol, atol=1e-12)
    assert [x is None for x in ours[1]] == [x is None for x in true[1]]
    for a, b in zip(ours[1], true[1]):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()) + 1e-12)


def cut(images: Tensor, texts: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(SIZES), texts.split(SIZES)))
