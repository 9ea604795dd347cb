"""Models with non-trivial weights, and distances between results, for tests of the encoders."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


def scatter(model: nn.Module, seed: int = 0) -> nn.Module:
    """Change a model as training would, so that no bias is 0, no gain 1 and no running statistic fresh; in
    eval mode.
    """
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or (parameter.dim() == 2 and parameter.std() < 1e-2):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
        for name, statistic in model.named_buffers():
            if name.endswith("running_mean"):
                statistic.add_(0.1 * torch.randn(statistic.shape, generator=draw))
            if name.endswith("running_var"):
                statistic.mul_(1 + 0.3 * torch.rand(statistic.shape, generator=draw))
    return model.eval()
