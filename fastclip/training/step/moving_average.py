"""The moving average of a model's weights (EMA)."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["MovingAverage"]


class MovingAverage:
    """Average of a model's weights: average = decay average + (1 - decay) weight after every update (EMA).

    The decay of update n is at most (1 + n) / (10 + n), so that a young average forgets its random start. Buffers are
    not averaged.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.averages = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, p in zip(self.averages, self._parameters):
            average.lerp_(p, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and averages; a second call undoes it."""
        for average, p in zip(self.averages, self._parameters):
            weight = p.detach().clone()
            p.copy_(average)
            average.copy_(weight)
