"""What torch differentiates or batches by its own formulas only: torch.func's transforms and forward mode.

An op hides its formula from them: its tangent would be 0. There the losses are the reference's dense torch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastclip import _env
from fastclip._backends import check_name

__all__ = ["check_transformable", "transformed"]


def transformed(*tensors: Tensor) -> bool:
    """Return True under a torch.func transform (grad, vmap, jvp, ...), or if a tensor has a forward-mode tangent."""
    if torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def check_transformable(backend: str | None) -> None:
    """Raise RuntimeError if another backend than the reference was asked for by name."""
    name = backend or _env.backend()
    check_name(name)
    if name not in (None, "reference"):
        raise RuntimeError(
            f"backend={name!r} cannot serve this call: torch.func's transforms and forward-mode derivatives need "
            f"dense torch; pass backend='reference' or leave the choice open"
        )
