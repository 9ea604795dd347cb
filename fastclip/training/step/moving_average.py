"""The moving average of a model's weights (EMA)."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastclip.training.step.optim import plain_and_sharded

__all__ = ["MovingAverage"]


class MovingAverage:
    """Exponential moving average of a model's trainable weights (EMA).

    After every update, average = decay * average + (1 - decay) * weight. The decay of update n is at most
    (1 + n) / (10 + n), so that the average soon forgets the random initial weights. Buffers are not averaged.

    Args:
        model: model whose weights are averaged.
        decay: at least 0 and below 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.averages = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the current weights. Call it once after each update of the weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for pairs in plain_and_sharded(zip(self.averages, self._parameters), lambda pair: pair[0]):
            averages, weights = map(list, zip(*pairs))
            get_ema_multi_avg_fn(decay)(averages, weights, self.updates)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and averages in place; a second call restores them.

        Validation and saving need the averages in the model itself, because under FSDP only the model can gather its
        sharded parameters.
        """
        for average, p in zip(self.averages, self._parameters):
            weight = p.detach().clone()
            p.copy_(average)
            average.copy_(weight)
