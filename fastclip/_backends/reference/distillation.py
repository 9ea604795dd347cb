"""The statistics of a student and its teachers, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastclip._backends.problem import Problem, SideGrads, Sides, TeacherSide, TeacherSides
from fastclip._backends.reference.contrastive import contrastive_fwd, derivatives, gradients
from fastclip._backends.reference.matrix import diagonal, in_dtypes, inv_norms, softmax_weights, unit_rows

__all__ = ["distill_bwd", "distill_fwd"]


def _teacher_logits(t: Problem) -> tuple[Tensor, Tensor]:
    """Return the logits of a teacher and the mask of the negatives, (M, N) each."""
    r, c = inv_norms(t.image, t.normalize), inv_norms(t.text, t.normalize)
    z = t.scale.to(r.dtype) * unit_rows(t.image, r) @ unit_rows(t.text, c).T
    return z, ~diagonal(z, t.offset)


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
            weights = softmax_weights(z, kept, one.neg.to(z.dtype), torch.ones_like(one.pos).to(z.dtype), dim)
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
    g, cosine, s = derivatives(p, stats, grads)
    weights = s * g
    for k, t in enumerate(teachers):
        z, kept = _teacher_logits(t)
        z = z.to(g.dtype)
        for side, d, dim in zip(of_teachers, d_cosine, (1, 0)):
            weights = weights + softmax_weights(z, kept, side.neg[k].to(g.dtype), d[k].to(g.dtype), dim)
    return in_dtypes(gradients(p, stats, weights, (g * cosine).sum(), needs), *(x.dtype for x in p[:3]))
