"""Weight-space ensembles of a zero-shot and a fine-tuned model (WiSE-FT)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["interpolate"]


@torch.no_grad()
def interpolate(zero_shot: Mapping[str, Tensor], tuned: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) zero_shot + alpha tuned, name by name; 0 and 1 give either, bit for bit.

    Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", section 3. All that is a number is averaged,
    BatchNorm's running means and variances too, as their code does; integers (its counters) are `tuned`'s unless alpha
    is 0.

    Args:
        zero_shot, tuned: state dicts of one model.
        alpha: 0 to 1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
    if alpha in (0, 1):
        return dict(tuned if alpha else zero_shot)
    return {name: a.lerp(tuned[name], alpha) if a.is_floating_point() else tuned[name] for name, a in zero_shot.items()}
