"""The losses in plain torch operations: the definition that all other backends are compared with.

They are differentiable twice, run on any device in any floating dtype (16-bit features are computed in fp32), and need
M x N memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip._backends.problem import Problem, Side, SideGrads, Sides, TeacherSide, TeacherSides

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


def _diagonal(z: Tensor, offset: int) -> Tensor:
    """Return the mask of the pairs (i, i + offset), bool (M, N)."""
    i, j = (torch.arange(size, device=z.device) for size in z.shape)
    return i[:, None] + offset == j


def _positive_and_negatives(z: Tensor, p: Problem) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the masks of the positives, and of the negatives of the rows and of the columns, bool (M, N) each."""
    positive = diagonal = _diagonal(z, p.offset)
    if p.labels is not None:
        positive = p.labels[0][:, None] == p.labels[1]
    negative = ~positive
    if p.exclude_self:
        positive, negative = positive & ~diagonal, negative & ~diagonal
    if p.limits is None:
        return positive, (negative, negative)
    row_limit, col_limit = p.limits
    return positive, (negative & ~(z > row_limit[:, None]), negative & ~(z > col_limit))  # NaN stays a negative


def _largest(z: Tensor, dim: int) -> Tensor:
    """Return the maximum over a dimension, -inf if it is empty."""
    return z.amax(dim) if z.shape[dim] else z.new_full((z.shape[1 - dim],), -torch.inf)


def _logsumexp(z: Tensor, kept: Tensor, dim: int) -> Tensor:
    """Return the log-sum-exp of z where `kept`. If no element is kept it is -inf, with gradient 0."""
    z = z.masked_fill(~kept, -torch.inf)
    has_any = kept.any(dim)
    top = torch.where(has_any, _largest(z.detach(), dim), 0.0)
    total = (z - top.unsqueeze(dim)).exp().sum(dim)
    # The inner `where` keeps log away from 0: its infinite gradient there would become NaN in the outer `where`
    return torch.where(has_any, torch.where(has_any, total, 1.0).log() + top, -torch.inf)


def _softmax_weights(z: Tensor, kept: Tensor, lse: Tensor, d: Tensor, dim: int) -> Tensor:
    """Return d exp(z - lse) where `kept`, else 0."""
    has_any = lse > -torch.inf
    has_any |= lse.isnan()  # a row with NaN has a NaN gradient
    exponent = z - torch.where(has_any, lse, 0.0).unsqueeze(dim)
    # Outside the set the exponential may be infinite, and its derivative would be 0 times infinity
    weights = torch.where(has_any, d, 0.0).unsqueeze(dim) * exponent.masked_fill(~kept, -torch.inf).exp()
    return torch.where(kept, weights, 0.0)


def _through_norm(d_unit: Tensor, unit: Tensor, inv_norm: Tensor, normalize: bool) -> Tensor:
    """Return the gradient of the features from the gradient of their unit rows."""
    if not normalize:
        return d_unit
    along = torch.where(inv_norm * EPS < 1, (unit * d_unit).sum(1), 0.0)  # a clamped norm is constant
    return inv_norm[:, None] * (d_unit - along[:, None] * unit)


def contrastive_fwd(p: Problem, maxima: bool = False) -> Sides:
    """Return the statistics of the logits' rows (M,) and columns (N,), and with `maxima` also the largest logits.

    The statistics are in `wide_dtype`, because the loss is a difference of statistics, and a float32 near 100 has an
    error of 4e-6. The inverse norms are the result of `inv_norms`.
    """
    r, c = inv_norms(p.image, p.normalize), inv_norms(p.text, p.normalize)
    z = p.scale.to(r.dtype) * unit_rows(p.image, r) @ unit_rows(p.text, c).T
    positive, negatives = _positive_and_negatives(z, p)
    z_positive = torch.where(positive, z, 0.0)
    dims, wide = (1, 0), wide_dtype(z.device)  # a row's statistics are over the columns
    pos_lse = [r.new_empty(0) if p.labels is None else _logsumexp(z, positive, dim) for dim in dims]
    neg = [_logsumexp(z, negative, dim) for negative, dim in zip(negatives, dims)]
    pos = [z_positive.sum(dim) for dim in dims]
    tops: list[list[Tensor]] = [[], []]
    if maxima:
        tops = [
            [_largest(z.masked_fill(~kept, -torch.inf), dim) for kept in (negative, positive)]
            for negative, dim in zip(negatives, dims)
        ]
    rows, cols = (
        Side(neg.to(wide), pos.to(wide), pos_lse.to(wide), inv_norm, *(x.to(wide) for x in top))
        for neg, pos, pos_lse, inv_norm, top in zip(neg, pos, pos_lse, (r, c), tops)
    )
    return rows, cols


def contrastive_bwd(
    p: Problem, stats: Sides, grads: tuple[SideGrads, SideGrads], needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of image (M, D), text (N, D) and scale (), with None for those that `needs` excludes.

    `stats` are the results of `contrastive_fwd`, and `grads` the derivatives of the loss with respect to them.
    """
    g, cosine, s = _derivatives(p, stats, grads)
    return _in_dtypes(_gradients(p, stats, s * g, (g * cosine).sum(), needs), *(x.dtype for x in p[:3]))


def _derivatives(p: Problem, stats: Sides, grads: tuple[SideGrads, SideGrads]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the derivatives of the loss with respect to the logits (M, N), the cosines (M, N) and the scale ()."""
    dtype = stats[0].inv_norm.dtype
    rows, cols = (Side(*(x.to(dtype) for x in side.tensors())) for side in stats)
    d_rows, d_cols = (SideGrads(*(d.to(dtype) for d in side)) for side in grads)
    s = p.scale.to(dtype)
    cosine = unit_rows(p.image, rows.inv_norm) @ unit_rows(p.text, cols.inv_norm).T
    z = s * cosine
    positive, (row_negative, col_negative) = _positive_and_negatives(z, p)
    g = _softmax_weights(z, row_negative, rows.neg, d_rows.neg, 1)
    g = g + _softmax_weights(z, col_negative, cols.neg, d_cols.neg, 0)
    at_positives = d_rows.pos[:, None] + d_cols.pos
    if p.labels is not None:
        at_positives = at_positives + _softmax_weights(z, positive, rows.pos_lse, d_rows.pos_lse, 1)
        at_positives = at_positives + _softmax_weights(z, positive, cols.pos_lse, d_cols.pos_lse, 0)
    return torch.where(positive, at_positives, g), cosine, s


def _gradients(
    p: Problem, stats: Sides, d_cosine: Tensor, d_scale: Tensor, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the three gradients from the derivatives with respect to the cosines (M, N) and to the scale ()."""
    r, c = (side.inv_norm for side in stats)
    u, v = unit_rows(p.image, r), unit_rows(p.text, c)
    return (
        _through_norm(d_cosine @ v, u, r, p.normalize) if needs[0] else None,
        _through_norm(d_cosine.T @ u, v, c, p.normalize) if needs[1] else None,
        d_scale if needs[2] else None,
    )


def _in_dtypes(
    grads: Sequence[Tensor | None], *dtypes: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    d_image, d_text, d_scale = (None if d is None else d.to(dtype) for d, dtype in zip(grads, dtypes))
    return d_image, d_text, d_scale


def row_losses(side: Side, count: Tensor | None) -> Tensor:
    """Return the loss of each row (M,), or of each column (N,), from the statistics of that side.

    count: number of positives, or None for one each.

    Let q be the log-sum-exp over the positives. The log-sum-exp over all logits minus the mean positive logit equals
    softplus(neg - q) + q - pos / count. When the loss is close to 0, softplus and its derivative keep their relative
    accuracy, whereas the difference of log-sum-exp and logit, and its derivative softmax - 1, would be rounding errors.
    With a single positive, q equals pos, so q - pos / count is exactly 0. This difference is left out, because its
    rounding error would exceed a small loss.
    """
    if count is None:
        return _softplus(side.neg - side.pos)
    has_positive = count > 0
    # Rows without a positive get constant inputs before softplus, because its gradient at -inf - -inf is NaN.
    q = torch.where(has_positive, torch.where(count == 1, side.pos, side.pos_lse), 0.0)
    loss = _softplus(torch.where(has_positive, side.neg, -torch.inf) - q)
    mean_pos = side.pos / count.clamp_min(1)
    loss = loss + torch.where(count > 1, torch.where(has_positive, side.pos_lse, 0.0) - mean_pos, 0.0)
    return torch.where(has_positive, loss, 0.0)


def _softplus(x: Tensor) -> Tensor:
    """Return log(1 + exp x). torch's default threshold would return x itself above 20."""
    return F.softplus(x, threshold=64)


def _row_derivatives(side: Side, count: Tensor | None) -> SideGrads:
    """Return the derivatives of the `row_losses` with respect to the statistics."""
    if count is None:
        d_neg = torch.sigmoid(side.neg - side.pos)
        return SideGrads(d_neg, -d_neg, side.pos_lse)
    q = torch.where(count > 0, torch.where(count == 1, side.pos, side.pos_lse), 0.0)
    x = torch.where(count > 0, side.neg, -torch.inf) - q
    d_neg = torch.sigmoid(x)
    share = 1.0 / count.clamp_min(1).to(d_neg.dtype)
    d_pos = torch.where(count > 1, -share, torch.where(count == 1, -d_neg, 0.0))
    return SideGrads(d_neg, d_pos, torch.where(count > 1, torch.sigmoid(-x), 0.0))


def direction_fits(image: Tensor, text: Tensor) -> bool:
    return True


def direction_fwd(
    p: Problem, count: Tensor | None, divisor: Tensor, needs: list[bool], dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """Return the sum of the rows' losses / divisor, () in `dtype`, and the gradients of image, text and scale.

    count: number of positives of every row, int64 (M,), or None without labels. divisor: int64 (). A gradient that
    `needs` excludes is None. The gradients of the features have `saved_dtype`.
    """
    stats = rows, cols = contrastive_fwd(p)
    loss = (row_losses(rows, count).sum() / divisor).to(dtype)
    if not any(needs):
        return loss, None, None, None
    d_rows = SideGrads(*(d / divisor for d in _row_derivatives(rows, count)))
    d_cols = SideGrads(*(torch.zeros_like(x) for x in (cols.neg, cols.pos, cols.pos_lse)))
    g, cosine, s = _derivatives(p, stats, (d_rows, d_cols))
    grads = _gradients(p, stats, s * g, (g * cosine).sum(), needs)
    return loss, *_in_dtypes(grads, saved_dtype(p.image), saved_dtype(p.text), p.scale.dtype)


def direction_bwd(inputs: Sequence[Tensor], kept: Sequence[Tensor | None], d_loss: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients from `direction_fwd` times d_loss (), in the dtypes of the three inputs."""
    return sigmoid_bwd(inputs, kept, d_loss)


def _teacher_logits(t: Problem) -> tuple[Tensor, Tensor]:
    """Return the logits of a teacher and the mask of the negatives, (M, N) each."""
    r, c = inv_norms(t.image, t.normalize), inv_norms(t.text, t.normalize)
    z = t.scale.to(r.dtype) * unit_rows(t.image, r) @ unit_rows(t.text, c).T
    return z, ~_diagonal(z, t.offset)


def distill_fwd(p: Problem, teachers: Sequence[Problem]) -> tuple[Sides, TeacherSides]:
    """Return the statistics of `contrastive_fwd` of the student p, which has no labels, and those of its teachers.

    The teachers have the rows and the offset of p, and their own D, dtype and scale.
    """
    stats = contrastive_fwd(p)
    rows, cols = stats
    cosine = unit_rows(p.image, rows.inv_norm) @ unit_rows(p.text, cols.inv_norm).T
    sides: tuple[list[tuple[Tensor, ...]], ...] = [], []
    for t in teachers:
        z, kept = _teacher_logits(t)
        for side, one, dim in zip(sides, contrastive_fwd(t), (1, 0)):
            weights = _softmax_weights(z, kept, one.neg.to(z.dtype), torch.ones_like(one.pos).to(z.dtype), dim)
            side.append((one.neg, one.pos, (weights * cosine).sum(dim).to(one.neg.dtype)))
    of_rows, of_cols = (TeacherSide(*(torch.stack(x) for x in zip(*side))) for side in sides)
    return stats, (of_rows, of_cols)


def distill_bwd(
    p: Problem,
    teachers: Sequence[Problem],
    stats: Sides,
    of_teachers: TeacherSides,
    grads: tuple[SideGrads, SideGrads],
    d_cosine: tuple[Tensor, Tensor],
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of image, text and scale of the student p, with None for those that `needs` excludes.

    `stats` and `of_teachers` are the results of `distill_fwd`. `grads` are the derivatives of the loss with respect to
    `stats`, and `d_cosine` those with respect to `cosine` of the teachers' rows (K, M) and columns (K, N).
    """
    g, cosine, s = _derivatives(p, stats, grads)
    weights = s * g
    for k, t in enumerate(teachers):
        z, kept = _teacher_logits(t)
        z = z.to(g.dtype)
        for side, d, dim in zip(of_teachers, d_cosine, (1, 0)):
            weights = weights + _softmax_weights(z, kept, side.neg[k].to(g.dtype), d[k].to(g.dtype), dim)
    return _in_dtypes(_gradients(p, stats, weights, (g * cosine).sum(), needs), *(x.dtype for x in p[:3]))


def plain_saved(N: int) -> int:
    """Return how many fp32 numbers `plain_fwd` saves for `plain_bwd` with N pairs."""
    return 12 * N


def plain_fwd(
    image: Tensor, text: Tensor, scale: Tensor, image_weight: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Return the mean loss () of pairs without labels and what `plain_bwd` needs, (plain_saved(N),), both in fp32.

    image and text (N, D) may not be fp64, and scale () is fp32. The only positive of row i is column i. The loss is
    image_weight times the mean over images of softplus(row_neg - row_pos), plus 1 - image_weight times the mean over
    texts of softplus(col_neg - col_pos).
    """
    sides = contrastive_fwd(Problem(image, text, scale, normalize=normalize))
    rows, cols = (row_losses(side, None).mean() for side in sides)
    loss = image_weight * rows + (1.0 - image_weight) * cols
    saved = [x.double() for side in sides for x in (side.neg, side.pos, side.inv_norm)]
    return loss.float(), torch.cat(saved).view(torch.float32)


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
    """Return the gradients of image, text and scale for d_loss (), with None for those that `needs` excludes."""
    N, none = image.shape[0], saved.new_empty(0)
    stats, grads = [], []
    weights = image_weight, 1.0 - image_weight
    for weight, (neg, pos, inv_norm) in zip(weights, saved.view(torch.float64).view(2, 3, N)):
        d_neg = weight * d_loss.double() / N * torch.sigmoid(neg - pos)
        stats.append(Side(neg, pos, none, inv_norm.float()))
        grads.append(SideGrads(d_neg, -d_neg, none))
    p = Problem(image, text, scale, normalize=normalize)
    return contrastive_bwd(p, (stats[0], stats[1]), (grads[0], grads[1]), list(needs))


def sigmoid_fwd(
    p: Problem, bias: Tensor, divisor: int, needs: list[bool], dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """Return sum_ij softplus(-sign_ij (z_ij + bias)) / divisor, () in `dtype`, and its four gradients.

    sign_ij is 1 at the pairs (i, i + offset) and -1 elsewhere. The gradients are those of image, text, scale and bias
    (), with None for those that `needs` excludes. The gradients of the features have `saved_dtype`.
    """
    r, c = inv_norms(p.image, p.normalize), inv_norms(p.text, p.normalize)
    u, v = unit_rows(p.image, r), unit_rows(p.text, c)
    s = p.scale.to(r.dtype)
    cosine = u @ v.T
    z = s * cosine + bias.to(r.dtype)
    sign = torch.where(_diagonal(z, p.offset), -1.0, 1.0).to(z.dtype)
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
    """Return the gradients from `sigmoid_fwd` times d_loss (), in the dtypes of the four inputs."""
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


def saved_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a gradient that is saved until d_loss is known.

    It is fp32 for float16 features: in float16, small gradients would be flushed to zero before they are multiplied by
    d_loss, which includes a gradient scaler's factor.
    """
    return torch.float32 if x.dtype == torch.float16 else x.dtype
