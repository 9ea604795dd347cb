"""Distillation: the cross-entropy between the softmaxes of teachers and of a student, in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip._backends.problem import Problem, Side, Sides, TeacherSide, TeacherSides
from fastclip._backends.reference import row_losses
from fastclip.distributed import Shards, check_group, meet, reported, sharded_distillation
from fastclip.losses.inputs.arguments import (
    check_features,
    check_reduction,
    check_shard,
    check_share,
    describe,
    flag,
    scalar,
)
from fastclip.ops import autocast_features, distillation_statistics

__all__ = ["contrastive_and_distillation", "distillation_loss"]

_NAMES = "teacher_image_features", "teacher_text_features", "teacher_logit_scale"


def distillation_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    teacher_image_features: Tensor | Sequence[Tensor],
    teacher_text_features: Tensor | Sequence[Tensor],
    teacher_logit_scale: float | Tensor | Sequence[float | Tensor],
    *,
    normalize: bool = True,
    reduction: str = "mean",
    image_weight: float = 0.5,
    group: Any = None,
    equal_shards: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the cross-entropy of a student's softmaxes with those of one or more teachers, in bounded memory.

    The logits are those of `contrastive_loss`, z_ij of the student and t_ij of a teacher. The loss of image i is
    ``-sum_j P_ij log Q_ij``, where Q is the student's softmax over all texts, and P that of the teacher. If there are
    several teachers, P is the mean of their softmaxes (MobileCLIP, Vasu et al. 2024, section 3.3). The loss of a text
    is the same over all images. This is the second loss of open_clip's DistillClipLoss. The KL divergence differs from
    it by the entropy of P, which does not depend on the student.

    Args:
        image_features, text_features: (N, D), features of the student, float32, bfloat16, float16 or float64, on one
            device. Text i belongs to image i.
        logit_scale: factor of the student's cosines, already exponentiated. A number, or a tensor of one element, which
            receives a gradient if it requires one.
        teacher_image_features, teacher_text_features: the teacher's features of the same images and texts, (N, D_t), of
            any of these dtypes, or a list of them, one for each teacher. They receive no gradient.
        teacher_logit_scale: factor of the teacher's cosines, a number or tensor, or a list of them. It receives no
            gradient.
        normalize: divide each row of all features by its norm (at least 1e-12).
        reduction: "mean" (``image_weight`` times the mean over images plus ``1 - image_weight`` times the mean over
            texts), "sum" (the same of sums), or "none" (two vectors, the losses per image and per text, not weighted).
        image_weight: weight in [0, 1] of the losses of the images.
        group, equal_shards: compute the loss over the shards of several processes, as in `contrastive_loss`. The
            features of teachers are this rank's shard, too, and are gathered like the student's.
        backend: a name from `fastclip.backends()`. None chooses the best one that supports all features.

    Returns:
        A scalar, or two vectors (N,) with ``reduction="none"``. The dtype is float32, or float64 for float64 features
        of the student. With ``group``, rank r returns its share, as in `contrastive_loss`.

    Raises:
        ValueError: shapes, devices or options do not fit, or the three lists of teachers have different lengths.
        TypeError: the features of a model are not floating-point tensors of one dtype.
        RuntimeError: the named backend does not support these features, ``group`` is given without torch.distributed,
            or ``group`` is used under torch.func.
    """
    group = check_group(group)
    with reported(group, equal_shards, image_features):
        check_reduction(reduction, ("mean", "sum", "none"))
        image_weight = check_share("image_weight", image_weight)
    batch = _prepare(
        (image_features, text_features, logit_scale),
        (teacher_image_features, teacher_text_features, teacher_logit_scale),
        normalize=normalize,
        group=group,
        agreed={"function": "distillation_loss", "reduction": reduction, "image_weight": image_weight},
        equal_shards=equal_shards,
        backend=backend,
    )
    return _reduced(batch, _losses(batch), reduction, image_weight)


def contrastive_and_distillation(
    student: tuple[Tensor, Tensor, float | Tensor],
    teachers: tuple[Any, Any, Any],
    *,
    normalize: bool,
    group: Any = None,
    equal_shards: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the means of `contrastive_loss` and `distillation_loss`, from the same statistics.

    Both together take as many operations as the second alone. student and teachers: features of images and texts, and
    the scale, as in `distillation_loss`.
    """
    batch = _prepare(
        student,
        teachers,
        normalize=normalize,
        group=check_group(group),
        agreed={"function": "contrastive_and_distillation"},
        equal_shards=equal_shards,
        backend=backend,
    )
    rows, cols = (row_losses(side, None) for side in batch.stats[0])
    contrastive, distillation = (_reduced(batch, losses, "mean", 0.5) for losses in ((rows, cols), _losses(batch)))
    assert isinstance(contrastive, Tensor) and isinstance(distillation, Tensor)
    return contrastive, distillation


class _Batch(NamedTuple):
    """A checked student, and the statistics of its rows and columns and of those of the teachers."""

    student: Problem
    stats: tuple[Sides, TeacherSides]
    shards: Shards | None  # None if the features are the whole batch


def _prepare(
    student: tuple[Tensor, Tensor, float | Tensor],
    teachers: tuple[Any, Any, Any],
    *,
    normalize: bool,
    group: Any,
    agreed: dict[str, Any],
    equal_shards: bool,
    backend: str | None,
) -> _Batch:
    """Check the arguments, apply autocast, let the ranks agree, and compute the statistics.

    agreed: further options that must be equal on all ranks of `group`.
    """
    image, text, logit_scale = student
    with reported(group, equal_shards, image):
        normalize = flag("normalize", normalize)
        may_be_empty = group is not None and not equal_shards
        options: dict[str, Any] = {"paired": True, "backend": backend, "may_be_empty": may_be_empty}
        check_features(image, text, **options)
        scale = scalar("logit_scale", logit_scale, image)
        features = autocast_features(image, text, scale)
        p = Problem(features[0], features[1], features[2], normalize=normalize)
        problems = [_checked(teacher, p, image, options) for teacher in _teachers(*teachers)]
        if group is not None:
            for one in (p, *problems):
                check_shard(backend, *one[:3])
    if group is None:
        return _Batch(p, distillation_statistics(p, problems, backend), None)
    agreed = {**agreed, "normalize": normalize, "teachers": [(t.image.shape[1], t.image.dtype) for t in problems]}
    # One number for the scales of all teachers, which hardly any other scales have
    scales = torch.stack([(k + 1) ** 0.5 * t.scale for k, t in enumerate(problems)]).sum()
    shards = meet(group, p.image, p.text, {"logit_scale": p.scale, "teacher_logit_scale": scales}, agreed, equal_shards)
    return _Batch(p, sharded_distillation(p, problems, shards, backend), shards)


class _Teacher(NamedTuple):
    """The arguments of one teacher, and their names for messages."""

    image: Tensor
    text: Tensor
    scale: float | Tensor
    names: tuple[str, ...]


def _teachers(images: Any, texts: Any, scales: Any) -> list[_Teacher]:
    """Return the teachers. Raise ValueError unless there are as many of each argument."""
    given = dict(zip(_NAMES, (images, texts, scales)))
    lists = [name for name, x in given.items() if isinstance(x, (list, tuple))]
    if not lists:
        return [_Teacher(images, texts, scales, _NAMES)]
    counts = {name: len(x) if name in lists else 1 for name, x in given.items()}
    if len(lists) < 3 or len(set(counts.values())) > 1 or 0 in counts.values():
        kinds = (f"{name} {_kind(x)}" for name, x in given.items())
        raise ValueError(f"pass one list element for each teacher in all three arguments: {', '.join(kinds)}")
    return [
        _Teacher(*one, tuple(f"{name}[{k}]" for name in _NAMES)) for k, one in enumerate(zip(images, texts, scales))
    ]


def _kind(x: Any) -> str:
    if isinstance(x, (list, tuple)):
        return f"a list of {len(x)}"
    return f"no list but a {type(x).__name__}{f' {tuple(x.shape)}' if isinstance(x, Tensor) else ''}"


def _checked(teacher: _Teacher, student: Problem, features: Tensor, options: dict[str, Any]) -> Problem:
    """Return the problem of a teacher whose arguments fit those of the student, without gradients."""
    image, text, scale, names = teacher
    check_features(image, text, names=(names[0], names[1]), **options)
    if image.shape[0] != features.shape[0] or image.device != features.device:
        raise ValueError(
            f"a teacher needs features of the student's images, on their device: {describe(names[0], image)} for "
            f"{describe('image_features', features)}"
        )
    tensors = (image.detach(), text.detach(), scalar(names[2], scale, features).detach())
    image, text, scale = autocast_features(*tensors)
    if image.dtype == torch.float64 or student.image.dtype == torch.float64:
        # Backends compute with float64 features only if all are
        wide = torch.promote_types(student.image.dtype, torch.float32)
        image, text, scale = image.to(wide), text.to(wide), scale.to(wide)
    return Problem(image, text, scale, normalize=student.normalize)


def _reduced(
    batch: _Batch, losses: tuple[Tensor, Tensor], reduction: str, image_weight: float
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the loss from those of this rank's images and texts."""
    student, _, shards = batch
    row_loss, col_loss = losses
    dtype = student.scale.dtype
    if reduction == "none":
        return row_loss.to(dtype), col_loss.to(dtype)
    total = image_weight * row_loss.sum() + (1.0 - image_weight) * col_loss.sum()
    if reduction == "mean":
        total = total / (student.image.shape[0] if shards is None else sum(shards.images))
    return (total if shards is None else shards.ranks * total).to(dtype)


def _losses(batch: _Batch) -> tuple[Tensor, Tensor]:
    """Return the distillation loss of every image (M,) and of every text (N,)."""
    rows, cols = (_direction_loss(*side, batch.student.scale) for side in zip(*batch.stats))
    return rows, cols


def _direction_loss(side: Side, of_teachers: TeacherSide, scale: Tensor) -> Tensor:
    """Return the losses (M,) of the rows, or (N,) of the columns, from the statistics of that side.

    Let p be the positive, which both softmaxes contain. As P sums to 1, the cross-entropy is

        -log Q_p + sum over the negatives j of P_j (z_p - z_j)

    and the sum is the teacher's probability of all negatives times z_p minus their mean logit. If student and teacher
    are sure of the pair, both terms are small and keep their digits, unlike the difference of a log-sum-exp and a mean.
    """
    share = torch.sigmoid(of_teachers.neg - of_teachers.pos).detach()  # (K, M): the teachers' probability of negatives
    gap = side.pos - scale.to(side.pos.dtype) * of_teachers.cosine
    return row_losses(side, None) + (share * gap).mean(0)
