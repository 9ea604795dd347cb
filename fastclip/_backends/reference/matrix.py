"""The matrix of logits: rows of unit length, masks of positives and negatives, and sums over rows and columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastclip._backends.problem import Problem

__all__ = [
    "EPS",
    "diagonal",
    "in_dtypes",
    "inv_norms",
    "kept_gradients",
    "largest",
    "logsumexp",
    "norms",
    "positive_and_negatives",
    "saved_dtype",
    "softmax_weights",
    "through_norm",
    "unit_rows",
    "wide_dtype",
]

EPS = 1e-12  # lower bound of a norm, as in torch.nn.functional.normalize


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on Apple's GPUs, which do not support float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def norms(x: Tensor) -> Tensor:
    """Return the norm of every row (M, D) -> (M,), in `wide_dtype`, so that no square overflows or vanishes."""
    return torch.linalg.vector_norm(x, dim=1, dtype=wide_dtype(x.device))


def inv_norms(x: Tensor, normalize: bool) -> Tensor:
    """Return 1 / max(norm, EPS) of every row (M, D) -> (M,), or ones, in fp32 (fp64 for fp64 features)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not normalize:
        return torch.ones(x.shape[0], dtype=dtype, device=x.device)
    return norms(x).clamp_min(EPS).reciprocal().to(dtype)


def unit_rows(x: Tensor, r: Tensor) -> Tensor:
    """Return the rows (M, D) times their `inv_norms` r (M,), in the dtype of r."""
    return r[:, None] * x.to(r.dtype)


def diagonal(z: Tensor, offset: int) -> Tensor:
    """Return the mask of the pairs (i, i + offset), bool (M, N)."""
    i, j = (torch.arange(size, device=z.device) for size in z.shape)
    return i[:, None] + offset == j


def positive_and_negatives(z: Tensor, p: Problem) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the masks of the positives, and of the negatives of the rows and of the columns, bool (M, N) each."""
    positive = own = diagonal(z, p.offset)
    if p.labels is not None:
        positive = p.labels[0][:, None] == p.labels[1]
    negative = ~positive
    if p.exclude_self:
        positive, negative = positive & ~own, negative & ~own
    if p.limits is None:
        return positive, (negative, negative)
    row_limit, col_limit = p.limits
    return positive, (negative & ~(z > row_limit[:, None]), negative & ~(z > col_limit))  # NaN stays a negative


def largest(z: Tensor, dim: int) -> Tensor:
    """Return the maximum over a dimension, -inf if it is empty."""
    return z.amax(dim) if z.shape[dim] else z.new_full((z.shape[1 - dim],), -torch.inf)


def logsumexp(z: Tensor, kept: Tensor, dim: int) -> Tensor:
    """Return the log-sum-exp of z where `kept`. If no element is kept it is -inf, with gradient 0."""
    z = z.masked_fill(~kept, -torch.inf)
    has_any = kept.any(dim)
    top = torch.where(has_any, largest(z.detach(), dim), 0.0)
    total = (z - top.unsqueeze(dim)).exp().sum(dim)
    # The inner `where` keeps log away from 0: its infinite gradient there would become NaN in the outer `where`
    return torch.where(has_any, torch.where(has_any, total, 1.0).log() + top, -torch.inf)


def softmax_weights(z: Tensor, kept: Tensor, lse: Tensor, d: Tensor, dim: int) -> Tensor:
    """Return d exp(z - lse) where `kept`, else 0."""
    has_any = lse > -torch.inf
    has_any |= lse.isnan()  # a row with NaN has a NaN gradient
    exponent = z - torch.where(has_any, lse, 0.0).unsqueeze(dim)
    # Outside the set the exponential may be infinite, and its derivative would be 0 times infinity
    weights = torch.where(has_any, d, 0.0).unsqueeze(dim) * exponent.masked_fill(~kept, -torch.inf).exp()
    return torch.where(kept, weights, 0.0)


def through_norm(d_unit: Tensor, unit: Tensor, inv_norm: Tensor, normalize: bool) -> Tensor:
    """Return the gradient of the features from the gradient of their unit rows."""
    if not normalize:
        return d_unit
    along = torch.where(inv_norm * EPS < 1, (unit * d_unit).sum(1), 0.0)  # a clamped norm is constant
    return inv_norm[:, None] * (d_unit - along[:, None] * unit)


def in_dtypes(
    grads: Sequence[Tensor | None], *dtypes: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    d_image, d_text, d_scale = (None if d is None else d.to(dtype) for d, dtype in zip(grads, dtypes))
    return d_image, d_text, d_scale


def saved_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a gradient that is saved until d_loss is known.

    It is fp32 for float16 features: in float16, small gradients would be flushed to zero before they are multiplied by
    d_loss, which includes a gradient scaler's factor.
    """
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def kept_gradients(
    inputs: Sequence[Tensor], kept: Sequence[Tensor | None], d_loss: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients that a forward pass computed and saved times d_loss (), in the dtypes of the inputs."""
    out: list[Tensor | None] = []
    for x, d in zip(inputs, kept):
        if d is None:
            out.append(None)
            continue
        dtype = d.dtype if d.dtype == torch.float64 else torch.float32
        # d_loss stays in fp32. A zero-dimensional tensor does not promote the dtype of the saved gradient d, so a
        # bfloat16 product is rounded only once.
        product = d * (d_loss if d_loss.dtype == dtype else d_loss.to(dtype))
        out.append(product if product.dtype == x.dtype else product.to(x.dtype))
    return tuple(out)
