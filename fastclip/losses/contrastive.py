"""The contrastive loss, computed in a few lines of torch from the row and column statistics of the ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastclip._backends.problem import Problem, Side, Sides
from fastclip._backends.reference import inv_norms, row_losses, unit_rows
from fastclip.distributed import (
    check_comm,
    check_group,
    reported,
    sum_over_ranks,
    whole_rows,
)
from fastclip.losses.inputs.arguments import (
    check_reduction,
    check_share,
    plain_problem,
)
from fastclip.losses.inputs.batch import Batch, batch_size, prepare, statistics_of
from fastclip.ops import (
    no_autocast,
    one_direction,
    one_pass,
    plain_loss,
)

__all__ = ["contrastive_loss", "direction_losses"]

_NUMBERS = (float, int)


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor = 1 / 0.07,
    *,
    normalize: bool = True,
    image_labels: Tensor | None = None,
    text_labels: Tensor | None = None,
    exclude_self: bool = False,
    ignore_label: int | None = None,
    image_weight: float = 0.5,
    label_smoothing: float = 0.0,
    negative_margin: float | None = None,
    reduction: str = "mean",
    group: Any = None,
    comm: str = "gather",
    equal_shards: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the symmetric cross-entropy over the M x N similarities of images and texts, in bounded memory.

    The logits are ``logits_ij = logit_scale * <image_i, text_j>``, of the normalised features unless
    ``normalize=False``. The loss is ``image_weight`` times the mean over images of -log softmax at the image's text,
    plus ``1 - image_weight`` times the mean over texts of -log softmax at the text's image. This is InfoNCE in both
    directions (CLIP, Radford et al. 2021, figure 3).

    Args:
        image_features: (M, D), float32, bfloat16, float16 or float64.
        text_features: (N, D), same dtype and device as ``image_features``. Without labels, M = N and text i belongs to
            image i.
        logit_scale: factor of the cosines, 1 / temperature, already exponentiated. A number, or a tensor of one
            element, which receives a gradient if it requires one.
        normalize: divide each row by its norm (at least 1e-12, so that zero rows stay finite). The gradient passes
            through the division.
        image_labels, text_labels: integers, (M,) and (N,). Every pair with equal labels is a positive, and the loss of
            a row is the mean of -log softmax over its positives (UniCL, Yang et al. 2022, equation 3, and Florence).
            Rows and columns without a positive are left out of the mean, but remain negatives of the others.
        exclude_self: with labels, pair (i, i) is neither a positive nor a negative. Use it when features are compared
            with themselves, ``contrastive_loss(x, x, s, image_labels=y, text_labels=y, exclude_self=True)``, where y is
            the index of the image that a view was made from (SimCLR, Chen et al. 2020), or the class of that image
            (SupCon, Khosla et al. 2020, L_out).
        ignore_label: label, often -1, that marks rows without a class. These rows are neither positives nor negatives:
            loss and gradients are those of the batch without them, and the gradients of these rows are 0. The host
            waits for the device, because it needs the number of remaining rows. With None every label is a class, and a
            label of -1 is an error: a ValueError on a CPU, a RuntimeError under torch.compile. On a GPU the host does
            not wait to check the labels, so the error is a device-side assertion like that of cross_entropy, after
            which the CUDA context is unusable. On other devices -1 is a class.
        image_weight: weight w in [0, 1] of the image -> text direction (0.75 in ConVIRT, Zhang et al. 2020). ALIGN's
            sum of both directions is twice the default. With 1 or 0 the other direction is not computed. On a CPU, and
            unless ``label_smoothing``, ``reduction="none"`` or ``comm="ring"`` is used, the gradients are then computed
            in the forward pass, and the graph holds them until the backward pass.
        label_smoothing: eps in [0, 1] (ALIGN: 0.1). The targets of an image are (1 - eps) / n on its n positives plus
            eps / N on all N texts. The targets of a text are the same with eps / M on all M images. ``exclude_self``
            leaves pair (i, i) out, so that N - 1 texts or M - 1 images remain.
        negative_margin: number m, of any sign. A negative whose logit exceeds the image's positive logit (the mean of
            several) by more than m |logit_scale| is probably false, and is left out of the image's negatives. A text's
            negatives are left out in the same way, so a pair may count in one direction only (Qwen3-Embedding, Zhang et
            al. 2025). A tie as in `contrastive_stats` counts. Gradients are those of the remaining pairs. With labels
            this takes one more product of the features. It cannot be combined with ``label_smoothing``.
        reduction: "mean", "sum" (w sum_i + (1 - w) sum_j), or "none" (two vectors, the losses per image (M,) and per
            text (N,), not weighted).
        group: `torch.distributed` process group (``torch.distributed.group.WORLD``) or one-dimensional device mesh.
            The features and labels are then this rank's shard of the batch. Shards may differ in size or be empty.
            Without labels, image i of a rank belongs to text i of the same rank. The features of an empty shard must
            require gradients if the features of other ranks do. Call ``init_process_group`` first: before this call,
            WORLD is None, and the loss is that of this process alone.
        comm: how a rank obtains the texts of the other ranks. "gather": every rank holds all texts, N x D, with one
            all-gather in the forward and one reduce-scatter in the backward pass. "ring": texts pass from rank to rank
            while the previous block is computed, and a rank holds a few shards at a time.
        equal_shards: promise that all shards have the same size and all ranks pass the same options. Otherwise sizes
            and options are exchanged before every call, and the host waits for them. CUDA graphs and
            ``torch.compile(fullgraph=True)`` need ``equal_shards=True``.
        backend: a name from `fastclip.backends()`. None chooses the best one that supports these features. Under
            torch.func transforms and forward-mode derivatives it chooses the reference (plain torch, which stores the
            M x N matrix).

    Returns:
        A scalar, or two vectors with ``reduction="none"``. The dtype is float32, or float64 for float64 features.

        If ``group`` is given, rank r of W returns
        L_r = W (w sum of its images' losses / M + (1 - w) sum of its texts' losses / N), where M and N count the images
        and texts of the whole batch (with labels, only those that have a positive). Gradients are those of the sum of
        all L_r. DDP and FSDP average gradients over the ranks, so that their result is exactly the gradient of the
        whole batch's mean loss, for the encoders and for ``logit_scale``. To log the batch's loss, average L_r over the
        ranks: call ``torch.distributed.all_reduce(value, ReduceOp.AVG)`` on a detached copy. gloo has no AVG: use SUM
        and divide by W. With "sum" a rank returns W times the weighted sum over its images and texts, with "none" the
        losses of its images and texts.

    Raises:
        ValueError: shapes, devices, options or labels do not fit, or the batch has no positive pair (checked on a CPU
            outside torch.compile; elsewhere the loss is 0).
        TypeError: the features are not floating-point tensors of one dtype, or labels are not integers.
        RuntimeError: the named backend does not support these features, ``group`` is given without torch.distributed,
            or ``group`` is used under torch.func.

    If ``group`` is given, a rank with invalid arguments raises its error, and all other ranks raise a ValueError that
    quotes the error. If ranks disagree on D, dtype, scale or options, all ranks raise. With ``equal_shards`` errors are
    not exchanged: the other ranks wait until the group's timeout.
    """
    no_labels = image_labels is None and text_labels is None and ignore_label is None and exclude_self is False
    no_labels = no_labels and negative_margin is None
    one_mean = reduction == "mean" and group is None and comm == "gather"
    if no_labels and one_mean and type(label_smoothing) in _NUMBERS and not label_smoothing:
        loss = _plain_loss(image_features, text_features, logit_scale, image_weight, normalize, backend)
        if loss is not None:
            return loss
    group = check_group(group)
    with reported(group, equal_shards, image_features):
        check_comm(comm)
        image_weight = check_share("image_weight", image_weight)
        check_reduction(reduction, ("mean", "sum", "none"))
    batch = prepare(
        image_features,
        text_features,
        logit_scale,
        normalize=normalize,
        image_labels=image_labels,
        text_labels=text_labels,
        exclude_self=exclude_self,
        ignore_label=ignore_label,
        label_smoothing=label_smoothing,
        negative_margin=negative_margin,
        group=group,
        comm=comm,
        agreed={"function": "contrastive_loss", "image_weight": image_weight, "reduction": reduction, "comm": comm},
        equal_shards=equal_shards,
        backend=backend,
    )
    one_pass_serves = comm == "gather" and batch.label_smoothing == 0.0 and batch.problem.limits is None
    if _one_sided(image_weight) and reduction != "none" and one_pass_serves:
        return _one_direction(batch, reduction, image_weight, backend)
    return _reduced(batch, statistics_of(batch, comm, backend), reduction, image_weight)


def _plain_loss(
    image: Tensor, text: Tensor, scale: float | Tensor, image_weight: float, normalize: bool, backend: str | None
) -> Tensor | None:
    """Return the mean loss of pairs, computed by one op, which takes a tenth of the host time of the general path.

    None is returned if the arguments need the full checks of `contrastive_loss`.
    """
    if type(normalize) is not bool or type(image_weight) not in _NUMBERS or not 0.0 <= image_weight <= 1.0:
        return None
    problem = plain_problem(image, text, scale)
    if problem is None:
        return None
    image, text, scale = problem
    if image_weight != 0.5 and _one_sided(image_weight) and one_pass(backend, image, text):
        p = whole_rows(Problem(image, text, scale, normalize=normalize), None, image_weight)
        return one_direction(p, None, image.shape[0], backend, torch.float32)
    return plain_loss(problem, image_weight, normalize, backend)


def _one_sided(image_weight: float) -> bool:
    return image_weight == 0.0 or image_weight == 1.0  # `in` would fix the weight in a graph


def _one_direction(batch: Batch, reduction: str, image_weight: float, backend: str | None) -> Tensor:
    """Return the loss of `contrastive_loss` if one direction has all the weight."""
    side = 0 if image_weight == 1.0 else 1
    p = whole_rows(batch.problem, batch.shards, image_weight)
    count = None if batch.counts is None else batch.counts[side]
    divisor = batch.counted[side] if reduction == "mean" else 1
    loss = one_direction(p, count, divisor, backend, p.scale.dtype)
    return loss if batch.shards is None else batch.shards.ranks * loss


def _reduced(batch: Batch, stats: Sides, reduction: str, image_weight: float) -> Tensor | tuple[Tensor, Tensor]:
    """Return the loss of `contrastive_loss` from the statistics."""
    rows, cols = stats
    dtype = batch.problem.scale.dtype
    every_loss_counts_the_same = batch.counts is None and reduction == "mean" and image_weight == 0.5
    if every_loss_counts_the_same and batch.shards is None and not batch.label_smoothing:  # half as many operations
        both = rows._replace(neg=torch.cat((rows.neg, cols.neg)), pos=torch.cat((rows.pos, cols.pos)))
        return row_losses(both, None).mean().to(dtype)
    row_loss, col_loss = direction_losses(batch, stats)
    if reduction == "none":
        losses = row_loss.to(dtype), col_loss.to(dtype)
        return losses if batch.kept is None else batch.kept.spread(*losses)
    row_total, col_total = row_loss.sum(), col_loss.sum()
    if reduction == "mean":
        rows_counted, cols_counted = batch.counted
        row_total, col_total = row_total / rows_counted, col_total / cols_counted
    total = image_weight * row_total + (1.0 - image_weight) * col_total  # lerp would fix the weight in a graph
    return (total if batch.shards is None else batch.shards.ranks * total).to(dtype)


def direction_losses(batch: Batch, stats: Sides) -> tuple[Tensor, Tensor]:
    """Return the loss of every image (M,) and of every text (N,)."""
    rows, cols = stats
    row_mean = col_mean = None
    if batch.label_smoothing:
        row_mean, col_mean, col_neg = mean_logits(batch, cols.neg)
        cols = cols._replace(neg=col_neg)
    row_count, col_count = batch.counts or (None, None)
    return (
        _direction_loss(rows, row_count, batch.label_smoothing, row_mean),
        _direction_loss(cols, col_count, batch.label_smoothing, col_mean),
    )


def _direction_loss(side: Side, count: Tensor | None, smoothing: float, mean_logit: Tensor | None) -> Tensor:
    """Return the loss of each row (M,), or of each column (N,), from the statistics of that side.

    count: number of positives, or None for one each. mean_logit: mean of the row's logits, for label smoothing.
    """
    loss = row_losses(side, count)
    if mean_logit is None:
        return loss
    if count is None:
        return loss + smoothing * (side.pos - mean_logit)
    mean_pos = side.pos / count.clamp_min(1)
    return torch.where(count > 0, loss + smoothing * (mean_pos - mean_logit), 0.0)


def _unit_factors(x: Tensor, normalize: bool) -> Tensor:
    """Return the `inv_norms` (M,) of x (M, D), differentiable.

    The derivative is computed from unit rows, because the squares of their elements do not overflow in any dtype.
    """
    r = inv_norms(x.detach(), normalize)
    if not normalize:
        return r
    u = unit_rows(x, r)
    square = torch.linalg.vecdot(u, u)
    return r * torch.where(square > 0.5, square, 1.0).rsqrt()  # a row shorter than EPS has a constant factor


def mean_logits(batch: Batch, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean of each row (M,) and of each column (N,) of the logits, and `after`.

    The means are products with the mean features, O((M + N) D). The argument `after` is the result of the previous
    collective. The caller must use the returned `after` from then on: this keeps the collectives in the same order on
    all ranks.
    """
    image, text, scale, _, _, exclude_self, normalize, _ = batch.problem
    shards = batch.shards
    M, N = batch_size(image, text, shards)
    with no_autocast(image.device):
        r, c = _unit_factors(image, normalize), _unit_factors(text, normalize)
        image, text = image.to(r.dtype), text.to(c.dtype)
        image_sum, text_sum = r @ image, c @ text
        if shards is not None:
            sums, after = sum_over_ranks(torch.stack([image_sum, text_sum]), after, shards.group)
            image_sum, text_sum = sums
        image_mean, text_mean = image_sum / M, text_sum / N
        row_mean, col_mean = r * (image @ text_mean), c * (text @ image_mean)
        if exclude_self:  # the mean over all others
            diagonal = torch.linalg.vecdot(unit_rows(image, r), unit_rows(text, c))
            row_mean, col_mean = ((N * mean - diagonal) / max(N - 1, 1) for mean in (row_mean, col_mean))
        return scale * row_mean, scale * col_mean, after
