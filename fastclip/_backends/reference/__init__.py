"""The losses in plain torch operations: the definition that all other backends are compared with.

They are differentiable twice, run on any device in any floating dtype (16-bit features are computed in fp32), and need
M x N memory.
"""

from __future__ import annotations

from torch import Tensor

from fastclip._backends.reference.contrastive import contrastive_bwd, contrastive_fwd, row_losses
from fastclip._backends.reference.direction import direction_fits, direction_fwd
from fastclip._backends.reference.distillation import distill_bwd, distill_fwd
from fastclip._backends.reference.matrix import EPS, inv_norms, norms, saved_dtype, unit_rows, wide_dtype
from fastclip._backends.reference.matrix import kept_gradients as direction_bwd
from fastclip._backends.reference.matrix import kept_gradients as sigmoid_bwd
from fastclip._backends.reference.plain import plain_bwd, plain_fwd, plain_saved
from fastclip._backends.reference.sigmoid import sigmoid_fwd

__all__ = [
    "EPS",
    "contrastive_bwd",
    "contrastive_fwd",
    "direction_bwd",
    "direction_fits",
    "direction_fwd",
    "distill_bwd",
    "distill_fwd",
    "inv_norms",
    "missing",
    "norms",
    "plain_bwd",
    "plain_fwd",
    "plain_saved",
    "refuses",
    "row_losses",
    "saved_dtype",
    "sigmoid_bwd",
    "sigmoid_fwd",
    "unit_rows",
    "wide_dtype",
]


def missing() -> str | None:
    return None


def refuses(image: Tensor, named: bool) -> str | None:
    return None
