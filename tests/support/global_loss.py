"""The global contrastive loss as SogCLR and FastCLIP write it: dense, in float64, with estimators that may overflow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class DenseGlobalLoss:
    """u[0] (samples,) and u[1] are the running means of the images and of the texts, NaN for samples not seen yet."""

    def __init__(self, samples: int, gamma: float, *, rho: float | None = None, eps: float = 0.0) -> None:
        self.u = torch.full((2, samples), torch.nan, dtype=torch.float64)
        self.gamma, self.rho, self.eps = gamma, rho, eps

    def __call__(self, image: Tensor, text: Tensor, scale: Tensor, index: Tensor) -> Tensor:
        """Return the value whose gradient is the papers' estimator. Update u."""
        z = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
        same = index[:, None] == index
        total = z.new_zeros(())
        for side, u in ((z, self.u[0]), (z.T, self.u[1])):
            positive = torch.where(same, side, 0).sum(1) / same.sum(1)
            g = torch.where(same, 0, (side - positive[:, None]).exp()).sum(1) / (~same).sum(1)
            for k in index.unique():  # one update for all pairs of a sample
                mean = g.detach()[index == k].mean()
                u[k] = mean if u[k].isnan() else (1 - self.gamma) * u[k] + self.gamma * mean
            now = self.eps + u[index]
            losses = now.log() + g / now - (g / now).detach()
            if self.rho is not None:
                losses = (losses + self.rho) / scale  # 1 / scale is the temperature, whose gradient has both factors
            total = total + losses.mean() / 2
        return total
