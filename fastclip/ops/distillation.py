"""``fastclip::distill_fwd`` and ``fastclip::distill_bwd``: the statistics of a student and its teachers as torch ops.

As for the contrastive loss, the loss is computed in torch from the statistics (`losses/distillation.py`), and the
backward op turns derivatives with respect to them into gradients of the student's features and scale. Teachers get no
gradient. `_backends/reference` defines what the ops compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip._backends import reference, serving
from fastclip._backends.problem import Problem, Side, SideGrads, Sides, TeacherSide, TeacherSides, in_turn
from fastclip.ops.autocast import no_autocast, without_autocast
from fastclip.ops.backward import TAGS, check_second_derivatives, vector_jacobian
from fastclip.ops.transforms import needs_dense

__all__ = ["distillation_statistics"]

_PROBLEM = (
    "Tensor image, Tensor text, Tensor scale, Tensor[] teacher_images, Tensor[] teacher_texts, Tensor teacher_scales, "
    "SymInt offset, bool normalize, str? backend"
)
_STATS = 12  # neg, pos and inv_norm of the student, then neg, pos and cosine of the teachers, of rows and columns each
_DERIVED = (0, 1, 2, 3, 10, 11)  # those with derivatives: neg and pos of the student, and cosine
torch.library.define("fastclip::distill_fwd", f"({_PROBLEM}) -> ({', '.join(['Tensor'] * _STATS)})", tags=TAGS)
torch.library.define(
    "fastclip::distill_bwd",
    f"({_PROBLEM}, Tensor[] stats, Tensor[] grads, bool[] needs) -> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)


class _Arguments(NamedTuple):
    """The first arguments of both ops, as `_PROBLEM` declares them."""

    image: Tensor
    text: Tensor
    scale: Tensor
    teacher_images: Sequence[Tensor]
    teacher_texts: Sequence[Tensor]
    teacher_scales: Tensor  # (K,)
    offset: int
    normalize: bool
    backend: str | None

    def problem(self) -> Problem:
        return Problem(self.image, self.text, self.scale, offset=self.offset, normalize=self.normalize)

    def teachers(self) -> list[Problem]:
        features = zip(self.teacher_images, self.teacher_texts, self.teacher_scales.unbind())
        return [Problem(*x, offset=self.offset, normalize=self.normalize) for x in features]

    def serving(self) -> ModuleType:
        """Return the backend module that supports the features of the student and of every teacher."""
        for image in (self.image, *self.teacher_images):
            module = serving(self.backend, self.problem()._replace(image=image))
            if module is reference:
                break
        return module


def _flat(stats: Sides, of_teachers: TeacherSides) -> tuple[Tensor, ...]:
    """Return the outputs of the forward op."""
    rows, cols = ((side.neg, side.pos, side.inv_norm, *of_side) for side, of_side in zip(stats, of_teachers))
    return tuple(in_turn(rows, cols))


def _by_side(tensors: Sequence[Tensor]) -> tuple[Sides, TeacherSides]:
    """Return the statistics of student and teachers: the inverse of `_flat`."""
    sides = tensors[0::2], tensors[1::2]
    rows, cols = (Side(neg, pos, neg.new_empty(0), inv_norm) for neg, pos, inv_norm, *_ in sides)
    of_rows, of_cols = (TeacherSide(*side[3:]) for side in sides)
    return (rows, cols), (of_rows, of_cols)


def _upstream(grads: Sequence[Tensor]) -> tuple[tuple[SideGrads, SideGrads], tuple[Tensor, Tensor]]:
    """Return the derivatives in the form that the backends take, from those of the statistics in `_DERIVED`."""
    *of_student, row_cosine, col_cosine = grads
    rows, cols = (SideGrads(neg, pos, neg.new_empty(0)) for neg, pos in (of_student[0::2], of_student[1::2]))
    return (rows, cols), (row_cosine, col_cosine)


@torch.library.impl("fastclip::distill_fwd", "default")
@without_autocast
def _fwd(*args: Any) -> tuple[Tensor, ...]:
    given = _Arguments(*args)
    return _flat(*given.serving().distill_fwd(given.problem(), given.teachers()))


@torch.library.register_fake("fastclip::distill_fwd")
def _fwd_fake(*args: Any) -> tuple[Tensor, ...]:
    given = _Arguments(*args)
    image, K = given.image, len(given.teacher_images)
    wide, dtype = reference.wide_dtype(image.device), torch.promote_types(image.dtype, torch.float32)
    sizes = image.shape[0], given.text.shape[0]
    of_student = [image.new_empty(size, dtype=wide) for _ in range(2) for size in sizes]
    of_student += [image.new_empty(size, dtype=dtype) for size in sizes]
    return *of_student, *(image.new_empty((K, size), dtype=wide) for _ in range(3) for size in sizes)


@torch.library.impl("fastclip::distill_bwd", "default")
@without_autocast
def _bwd(*args: Any) -> tuple[Tensor, ...]:
    *problem, stats, grads, needs = args
    given = _Arguments(*problem)
    out = given.serving().distill_bwd(given.problem(), given.teachers(), *_by_side(stats), *_upstream(grads), needs)
    return tuple(given.image.new_empty(0) if d is None else d.contiguous() for d in out)


@torch.library.register_fake("fastclip::distill_bwd")
def _bwd_fake(image: Tensor, text: Tensor, scale: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *_, needs = args
    return tuple(x.new_empty(x.shape) if need else image.new_empty(0) for x, need in zip((image, text, scale), needs))


def _keep(ctx: Any, args: _Arguments, tensors: Sequence[Tensor]) -> None:
    """Save the arguments, among them lists of tensors, and further tensors."""
    image, text, scale, images, texts, scales, *ctx.options = args
    ctx.teachers = len(images)
    ctx.save_for_backward(image, text, scale, scales, *images, *texts, *tensors)


def _kept(ctx: Any) -> tuple[_Arguments, tuple[Tensor, ...]]:
    """Return what `_keep` saved. Call it once per backward pass."""
    image, text, scale, scales, *others = ctx.saved_tensors
    K = ctx.teachers
    return _Arguments(image, text, scale, others[:K], others[K : 2 * K], scales, *ctx.options), tuple(others[2 * K :])


def _without_teachers(ctx: Any) -> tuple[Any, ...]:
    """Return the gradients of all arguments in `_PROBLEM` but the first three."""
    return [None] * ctx.teachers, [None] * ctx.teachers, None, None, None, None


def _save_fwd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # an unused statistic has gradient None instead of zeros of its size
    ctx.mark_non_differentiable(*(x for k, x in enumerate(output) if k not in _DERIVED))
    _keep(ctx, _Arguments(*inputs), output)


def _fwd_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    given, stats = _kept(ctx)
    needs = list(ctx.needs_input_grad[:3])
    upstream = [torch.zeros_like(stats[k]) if (d := grads[k]) is None else d for k in _DERIVED]
    if needs_dense(given.backend, *upstream):
        with no_autocast(given.image.device):
            p, teachers = given.problem(), given.teachers()
            out = reference.distill_bwd(p, teachers, *_by_side(stats), *_upstream(upstream), needs)
    else:
        out = torch.ops.fastclip.distill_bwd(*given, list(stats), upstream, needs)
    return *(d if need else None for d, need in zip(out, needs)), *_without_teachers(ctx)


torch.library.register_autograd("fastclip::distill_fwd", _fwd_backward, setup_context=_save_fwd)


def _save_bwd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *problem, stats, grads, needs = inputs
    _keep(ctx, _Arguments(*problem), grads)
    ctx.stats, ctx.needs = len(stats), needs


def _bwd_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Compute second derivatives: both functions are run again on the reference, so that autograd can see into them."""
    given, upstream = _kept(ctx)
    check_second_derivatives("distillation_loss", given.backend, given.image)
    with torch.enable_grad(), no_autocast(given.image.device):
        # Views are differentiated in place of the arguments: the upstream gradients were computed from the features,
        # and the derivatives below must not include that path
        inputs = [x.view_as(x) for x in (given.image, given.text, given.scale, *upstream)]
        image, text, scale, *d_stats = inputs
        p, teachers = given.problem()._replace(image=image, text=text, scale=scale), given.teachers()
        stats = reference.distill_fwd(p, teachers)
        out = reference.distill_bwd(p, teachers, *stats, *_upstream(d_stats), [True, True, True])
        second = vector_jacobian(out, [d if need else None for d, need in zip(grads, ctx.needs)], inputs)
    d_image, d_text, d_scale, *d_grads = second
    # `stats` get no gradient, because they were recomputed from the features
    return d_image, d_text, d_scale, *_without_teachers(ctx), [None] * ctx.stats, d_grads, None


torch.library.register_autograd("fastclip::distill_bwd", _bwd_backward, setup_context=_save_bwd)


def distillation_statistics(
    p: Problem, teachers: Sequence[Problem], backend: str | None = None
) -> tuple[Sides, TeacherSides]:
    """Return differentiable statistics of the student and its teachers: see `reference.distill_fwd`.

    Of the teachers' statistics only the cosines carry a gradient, which is that of the student.
    """
    if needs_dense(backend, p.image, p.text, p.scale):
        with no_autocast(p.image.device):
            return reference.distill_fwd(p, teachers)
    features = [t.image for t in teachers], [t.text for t in teachers], torch.stack([t.scale for t in teachers])
    given = _Arguments(p.image, p.text, p.scale, *features, p.offset, p.normalize, backend)
    return _by_side(torch.ops.fastclip.distill_fwd(*given))
