"""The losses in dense torch: what every other backend is compared with.

Differentiable twice, any device, any floating dtype (16-bit features are computed in fp32), M x N memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip._backends.problem import Problem

__all__ = [
    "EPS",
    "contrastive_bwd",
    "contrastive_fwd",
    "inv_norms",
    "missing",
    "norms",
    "plain_bwd",
    "plain_fwd",
    "plain_saved",
    "refuses",
    "sigmoid_bwd",
    "sigmoid_fwd",
    "unit_rows",
    "wide_dtype",
]

EPS = 1e-12  # lower bound of a norm, as in torch.nn.functional.normalize


def missing() -> str | None:
    return None


def refuses(image: Tensor, named: bool) -> str | None:
    return None


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def norms(x: Tensor) -> Tensor:
    """Norm of every row (M, D) -> (M,), of `wide_dtype`: no square overflows or vanishes."""
    return torch.linalg.vector_norm(x, dim=1, dtype=wide_dtype(x.device))


def inv_norms(x: Tensor, normalize: bool) -> Tensor:
    """1 / max(norm, EPS) of every row (M, D) -> (M,), or ones; fp32, for fp64 features fp64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not normalize:
        return torch.ones(x.shape[0], dtype=dtype, device=x.device)
    return norms(x).clamp_min(EPS).reciprocal().to(dtype)


def unit_rows(x: Tensor, r: Tensor) -> Tensor:
    """Rows (M, D) times their `inv_norms` r (M,), in the dtype of r."""
    return r[:, None] * x.to(r.dtype)


def _own(z: Tensor, offset: int) -> Tensor:
    """Every row's own pair, bool (M, N)."""
    i, j = (torch.arange(size, device=z.device) for size in z.shape)
    return i[:, None] + offset == j


def _positive_and_negative(z: Tensor, p: Problem) -> tuple[Tensor, Tensor]:
    """Which pairs of z (M, N) are positives, and which negatives: bool (M, N) each."""
    own = _own(z, p.offset)
    if p.labels is None:
        return own, ~own
    positive = p.labels[0][:, None] == p.labels[1]
    return (positive & ~own, ~positive & ~own) if p.exclude_self else (positive, ~positive)


def _largest(z: Tensor, dim: int) -> Tensor:
    """-inf over an empty dimension."""
    return z.amax(dim) if z.shape[dim] else z.new_full((z.shape[1 - dim],), -torch.inf)


def _logsumexp(z: Tensor, keep: Tensor, dim: int) -> Tensor:
    """log-sum-exp of the kept z; -inf, with gradient 0, where none is."""
    z = z.masked_fill(~keep, -torch.inf)
    some = keep.any(dim)
    top = torch.where(some, _largest(z.detach(), dim), 0.0)
    total = (z - top.unsqueeze(dim)).exp().sum(dim)
    return torch.where(some, torch.where(some, total, 1.0).log() + top, -torch.inf)


def _softmax_weights(z: Tensor, lse: Tensor, d: Tensor, dim: int) -> Tensor:
    """d exp(z - lse), 0 for empty sets."""
    some = lse > -torch.inf
    some |= lse.isnan()
    return torch.where(some, d, 0.0).unsqueeze(dim) * (z - torch.where(some, lse, 0.0).unsqueeze(dim)).exp()


def _through_norm(d_unit: Tensor, unit: Tensor, inv_norm: Tensor, normalize: bool) -> Tensor:
    """Gradient of the features from that of their unit rows."""
    if not normalize:
        return d_unit
    along = torch.where(inv_norm * EPS < 1, (unit * d_unit).sum(1), 0.0)  # a clamped norm is a constant
    return inv_norm[:, None] * (d_unit - along[:, None] * unit)


def contrastive_fwd(p: Problem, maxima: bool = False) -> tuple[Tensor, ...]:
    """Row and column statistics of the logits.

    row_neg (M,), col_neg (N,): log-sum-exp over the negatives, -inf when there are none; row_pos (M,), col_pos (N,):
    sum over the positives, 0 when there are none; row_pos_lse (M,), col_pos_lse (N,): log-sum-exp over the positives,
    of size 0 without labels; r (M,), c (N,): `inv_norms`. With `maxima` four more: the largest negative of every row
    (M,) and column (N,), and the largest positive likewise, -inf where there are none.

    The statistics are of `wide_dtype`: their differences make the loss, and at 100 a float32 has lost 4e-6.
    """
    r, c = inv_norms(p.image, p.normalize), inv_norms(p.text, p.normalize)
    z = p.scale.to(r.dtype) * unit_rows(p.image, r) @ unit_rows(p.text, c).T
    positive, negative = _positive_and_negative(z, p)
    z_positive = torch.where(positive, z, 0.0)
    if p.labels is None:
        row_pos_lse, col_pos_lse = r.new_empty(0), r.new_empty(0)
    else:
        row_pos_lse, col_pos_lse = _logsumexp(z, positive, 1), _logsumexp(z, positive, 0)
    row_neg, col_neg = _logsumexp(z, negative, 1), _logsumexp(z, negative, 0)
    stats = (row_neg, col_neg, z_positive.sum(1), z_positive.sum(0), row_pos_lse, col_pos_lse)
    wide = wide_dtype(z.device)
    of_both = ((z.masked_fill(~keep, -torch.inf), dim) for keep in (negative, positive) for dim in (1, 0))
    tops = [_largest(x, dim) for x, dim in of_both] if maxima else []
    return *(x.to(wide) for x in stats), r, c, *(x.to(wide) for x in tops)


def contrastive_bwd(
    p: Problem, stats: list[Tensor], grads: list[Tensor], needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of image (M, D), text (N, D) and scale (), each None where `needs` says so.

    `stats` are the first eight outputs of `contrastive_fwd`, `grads` the loss's derivatives by the first six.
    """
    row_neg, col_neg, _, _, row_pos_lse, col_pos_lse, r, c = (x.to(stats[7].dtype) for x in stats)
    d_row_neg, d_col_neg, d_row_pos, d_col_pos, d_row_pos_lse, d_col_pos_lse = (d.to(r.dtype) for d in grads)
    u, v = unit_rows(p.image, r), unit_rows(p.text, c)
    s = p.scale.to(r.dtype)
    cosine = u @ v.T
    z = s * cosine
    positive, negative = _positive_and_negative(z, p)
    at_negatives = _softmax_weights(z, row_neg, d_row_neg, 1) + _softmax_weights(z, col_neg, d_col_neg, 0)
    at_positives = d_row_pos[:, None] + d_col_pos
    if p.labels is not None:
        at_positives = at_positives + _softmax_weights(z, row_pos_lse, d_row_pos_lse, 1)
        at_positives = at_positives + _softmax_weights(z, col_pos_lse, d_col_pos_lse, 0)
    g = torch.where(positive, at_positives, torch.where(negative, at_negatives, 0.0))
    return (
        _through_norm(s * (g @ v), u, r, p.normalize).to(p.image.dtype) if needs[0] else None,
        _through_norm(s * (g.T @ u), v, c, p.normalize).to(p.text.dtype) if needs[1] else None,
        (g * cosine).sum().to(p.scale.dtype) if needs[2] else None,
    )


def plain_saved(N: int) -> int:
    """fp32 numbers that `plain_fwd` of N pairs hands to `plain_bwd`."""
    return 12 * N


def plain_fwd(
    image: Tensor, text: Tensor, scale: Tensor, image_weight: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Mean loss () of pairs without labels, and what `plain_bwd` needs, (plain_saved(N),); both fp32.

    image, text (N, D), row i's one positive is column i; scale () fp32; not for fp64 features. The loss is image_weight
    times the mean over images of softplus(row_neg - row_pos), plus the rest times the mirrored mean over texts.
    """
    *stats, r, c = contrastive_fwd(Problem(image, text, scale, None, 0, False, normalize))
    row_neg, col_neg, row_pos, col_pos = stats[:4]
    rows, cols = (F.softplus(t, threshold=64).mean() for t in (row_neg - row_pos, col_neg - col_pos))
    loss = image_weight * rows + (1.0 - image_weight) * cols
    return loss.float(), torch.cat([*stats[:4], r.double(), c.double()]).view(torch.float32)


def plain_bwd(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    saved: Tensor,
    image_weight: float,
    normalize: bool,
    d_loss: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of image, text and scale from that of the loss, d_loss (); each None where `needs` says so."""
    N = image.shape[0]
    row_neg, col_neg, row_pos, col_pos, r, c = saved.view(torch.float64).view(6, N)
    none = r.new_empty(0)
    row, col = image_weight * d_loss.double() / N, (1.0 - image_weight) * d_loss.double() / N
    grads = [row * torch.sigmoid(row_neg - row_pos), col * torch.sigmoid(col_neg - col_pos)]
    grads += [-grads[0], -grads[1], none, none]
    stats = [row_neg, col_neg, row_pos, col_pos, none, none, r.float(), c.float()]
    return contrastive_bwd(Problem(image, text, scale, None, 0, False, normalize), stats, grads, list(needs))


def sigmoid_fwd(
    p: Problem, bias: Tensor, divisor: int, needs: list[bool], dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """sum_ij softplus(-+(z_ij + bias)) / divisor, () of `dtype`, and its gradients by image, text, scale, bias ().

    Each gradient is None where `needs` says so, and of `saved_dtype`.
    """
    r, c = inv_norms(p.image, p.normalize), inv_norms(p.text, p.normalize)
    u, v = unit_rows(p.image, r), unit_rows(p.text, c)
    s = p.scale.to(r.dtype)
    cosine = u @ v.T
    z = s * cosine + bias.to(r.dtype)
    sign = torch.where(_own(z, p.offset), -1.0, 1.0).to(z.dtype)
    loss = (-F.logsigmoid(-sign * z).sum(dtype=wide_dtype(z.device)) / divisor).to(dtype)
    if not any(needs):
        return loss, None, None, None, None
    g = sign * torch.sigmoid(sign * z) / divisor
    return (
        loss,
        _through_norm(s * (g @ v), u, r, p.normalize).to(saved_dtype(p.image)) if needs[0] else None,
        _through_norm(s * (g.T @ u), v, c, p.normalize).to(saved_dtype(p.text)) if needs[1] else None,
        (g * cosine).sum().to(p.scale.dtype) if needs[2] else None,
        g.sum().to(bias.dtype) if needs[3] else None,
    )


def sigmoid_bwd(inputs: Sequence[Tensor], kept: Sequence[Tensor | None], d_loss: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients that `sigmoid_fwd` returned, times that of the loss, d_loss (); of the dtypes of the four inputs."""
    out: list[Tensor | None] = []
    for x, d in zip(inputs, kept):
        if d is None:
            out.append(None)
            continue
        dtype = d.dtype if d.dtype == torch.float64 else torch.float32
        product = d * (d_loss if d_loss.dtype == dtype else d_loss.to(dtype))  # of a scalar: bfloat16 is rounded once
        out.append(product if product.dtype == x.dtype else product.to(x.dtype))
    return tuple(out)


def saved_dtype(x: Tensor) -> torch.dtype:
    """Of a gradient that waits for the loss's own: a float16 would flush to zero before a gradient scaler's factor."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype
