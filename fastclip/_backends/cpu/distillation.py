"""The statistics of a student and its teachers, and the student's gradients, as `reference` defines them.

The dot products of student and teacher stand side by side in the workspace, in equal blocks. The native passes of the
contrastive loss serve both. In the backward pass they turn a teacher's block into weights, which are added to those of
the student, so that only the student's features are multiplied by weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastclip._backends.cpu import native
from fastclip._backends.cpu.blocks import (
    Features,
    Plan,
    factors,
    features_of,
    inv_norms,
    native_block,
    workspace,
)
from fastclip._backends.cpu.contrastive import LOG2E, State, Weights, gain_of
from fastclip._backends.problem import Problem, Side, SideGrads, Sides, TeacherSide, TeacherSides

__all__ = ["distill_bwd", "distill_fwd"]


class _Model(NamedTuple):
    """The features of a student or teacher, and the factors of their dot products (`factors`, `features_of`)."""

    features: tuple[Features, Features]
    inv_norms: tuple[Tensor, Tensor]
    factors: tuple[dict[str, Tensor | None], ...]


def _model(p: Problem, inverse: Sequence[Tensor]) -> _Model:
    (image, r), (text, c) = (features_of(x, inv, p.normalize) for x, inv in zip((p.image, p.text), inverse))
    return _Model((image, text), (r, c), factors(r, c, float(p.scale) * LOG2E))


def _of_teachers(teachers: Sequence[Problem]) -> list[_Model]:
    return [_model(t, [inv_norms(x, t.normalize) for x in (t.image, t.text)]) for t in teachers]


def distill_fwd(p: Problem, teachers: Sequence[Problem]) -> tuple[Sides, TeacherSides]:
    """Compute `reference.distill_fwd`."""
    inverse = [inv_norms(x, p.normalize) for x in (p.image, p.text)]
    student, others = _model(p, inverse), _of_teachers(teachers)
    plan = Plan(*student.features, others=[other.features for other in others])
    sizes = p.image.shape[0], p.text.shape[0]
    states = [State(size, side, None) for size, side in zip(sizes, student.factors)]
    of_others = [
        [State(size, side, None, other_factor=r) for size, side, r in zip(sizes, other.factors, student.inv_norms)]
        for other in others
    ]
    for block in plan.blocks:
        _, dots = plan.dots(block)
        native.module.contrastive_fwd(native_block(dots, p.offset), *(x.native for x in states), plan.workers)
        for k, of_other in enumerate(of_others):
            here = native_block(plan.beside(k, dots)[1], p.offset, other=dots[0])
            native.module.contrastive_fwd(here, *(x.native for x in of_other), plan.workers)
        workspace.keep(inverse[0], block)
    rows, cols = (state.results(inv) for state, inv in zip(states, inverse))
    of_rows, of_cols = (_stacked([of_other[side] for of_other in of_others]) for side in (0, 1))
    return (rows, cols), (of_rows, of_cols)


def _stacked(states: Sequence[State]) -> TeacherSide:
    """Return the statistics of one side of all teachers."""
    found = [state.results(state.pos) for state in states]
    cosine = [torch.where(state.neg_sum == 0.0, 0.0, state.neg_other / state.neg_sum) for state in states]
    return TeacherSide(torch.stack([x.neg for x in found]), torch.stack([x.pos for x in found]), torch.stack(cosine))


def distill_bwd(
    p: Problem,
    teachers: Sequence[Problem],
    stats: Sides,
    of_teachers: TeacherSides,
    grads: tuple[SideGrads, SideGrads],
    d_cosine: tuple[Tensor, Tensor],
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute `reference.distill_bwd`."""
    student, others = _model(p, [side.inv_norm for side in stats]), _of_teachers(teachers)
    plan = Plan(*student.features, owner=stats[0].inv_norm, others=[other.features for other in others])
    s, gain = float(p.scale), gain_of((*grads[0], *grads[1], *d_cosine))
    weights = [
        Weights(factor, inv, None, side, of_side, gain)
        for factor, inv, side, of_side in zip(student.factors, student.inv_norms, stats, grads)
    ]
    of_others = []
    for k, other in enumerate(others):
        sides = zip(other.factors, student.inv_norms, of_teachers, d_cosine)
        of_others.append([_teacher_weights(factor, inv, of, d, k, gain) for factor, inv, of, d in sides])
    d_image = p.image.new_empty(p.image.shape) if needs[0] else None
    d_text = p.text.new_empty(p.text.shape) if needs[1] else None
    d_scale = 0.0
    for dots in plan.backward(1.0 / gain, d_image, d_text):
        here = native_block(dots, p.offset)
        d_scale += native.module.contrastive_bwd(here, *(x.native for x in weights), plan.workers)
        total = plan.buffer[: dots[2] * dots[3]].view(dots[2], dots[3]).mul_(s)  # from logits to cosines
        for k, of_other in enumerate(of_others):
            weight, beside = plan.beside(k, dots)
            native.module.contrastive_bwd(native_block(beside, p.offset), *(x.native for x in of_other), plan.workers)
            total.add_(weight)
    return d_image, d_text, p.scale.new_tensor(d_scale / gain) if needs[2] else None


def _teacher_weights(
    factor: dict[str, Tensor | None], inv_norm: Tensor, side: TeacherSide, d_cosine: Tensor, k: int, gain: float
) -> Weights:
    """Return weights of the softmax over the negatives of teacher k. Positives get the weight 0."""
    none = side.neg.new_empty(0)
    grads = SideGrads(d_cosine[k], torch.zeros_like(side.pos[k]), none)
    return Weights(factor, inv_norm, None, Side(side.neg[k], side.pos[k], none, inv_norm), grads, gain)
