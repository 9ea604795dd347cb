"""The sigmoid loss of SigLIP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastclip._backends.problem import Problem
from fastclip.distributed import check_comm, check_group, reported, ring_sigmoid_pairs, with_all_texts
from fastclip.losses.inputs.arguments import check_reduction, plain_problem
from fastclip.losses.inputs.batch import Batch, batch_size, prepare
from fastclip.ops import sigmoid_pairs

__all__ = ["sigmoid_loss"]


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    normalize: bool = True,
    image_labels: Tensor | None = None,
    text_labels: Tensor | None = None,
    exclude_self: bool = False,
    ignore_label: int | None = None,
    negative_margin: float | None = None,
    reduction: str = "mean",
    group: Any = None,
    comm: str = "gather",
    equal_shards: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Compute the pairwise sigmoid loss over the M x N similarities of images and texts, in bounded memory.

    The loss is ``-sum_ij logsigmoid(sign_ij * (logit_scale * <image_i, text_j> + logit_bias)) / M``, where sign_ij is 1
    at the pairs i = j, or with labels at the pairs with equal labels, and -1 elsewhere (SigLIP, Zhai et al. 2023,
    section 3.2). Features are normalised unless ``normalize=False``.

    If gradients are needed, they are computed in the same pass as the loss. Between the forward and the backward pass
    the graph holds the gradients of both feature matrices, which are as large as the features (in float32 for float16
    features).

    Args:
        image_features: (M, D), float32, bfloat16, float16 or float64.
        text_features: (N, D), same dtype and device as ``image_features``. Without labels, M = N and text i belongs to
            image i.
        logit_scale: factor of the cosines, already exponentiated (SigLIP starts at 10). A number, or a tensor of one
            element, which receives a gradient if it requires one.
        logit_bias: number added to every logit (SigLIP starts at -10), of the same types as ``logit_scale``.
        normalize: divide each row by its norm (at least 1e-12, so that zero rows stay finite). The gradient passes
            through the division.
        image_labels, text_labels: integers, (M,) and (N,). Every pair with equal labels is a positive. A batch without
            a positive pair is allowed.
        exclude_self: with labels, leave pair (i, i) out of the sum, for features that are compared with themselves.
        ignore_label: label, often -1, that marks rows without a class. Loss and gradients are those of the batch
            without these rows, whose gradients are 0. The host waits for the device. None: as in `contrastive_loss`.
        negative_margin: number m, of any sign. A negative is left out of the sum if its logit exceeds the positive
            logit of its image or of its text (the mean of several) by more than m |logit_scale|. Ties count as in
            `contrastive_loss`, gradients are those of the remaining pairs, and with labels this takes one more product
            of the features.
        reduction: "mean", the sum over all pairs divided by M as in SigLIP, or "sum". Ignored images are not counted.
        group, comm, equal_shards: compute the loss over the shards of several processes, as in `contrastive_loss`. With
            "mean" a rank returns the sum over the pairs of its images with all texts, divided by the mean number of
            images per rank. With "sum" it returns that sum times the number of ranks.
        backend: a name from `fastclip.backends()`. None chooses the best one that supports these features. Under
            torch.func transforms and forward-mode derivatives it chooses the reference (plain torch, which stores the
            M x N matrix).

    Returns:
        A scalar, float32, or float64 for float64 features.

    Raises:
        ValueError: shapes, devices, options or labels do not fit.
        TypeError: the features are not floating-point tensors of one dtype, or labels are not integers.
        RuntimeError: the named backend does not support these features, ``group`` is given without torch.distributed,
            or ``group`` is used under torch.func.
    """
    no_labels = image_labels is None and text_labels is None and ignore_label is None and exclude_self is False
    if (
        no_labels
        and negative_margin is None
        and group is None
        and comm == "gather"
        and reduction in ("mean", "sum")
        and type(normalize) is bool
        and logit_bias is not None
    ):
        plain = plain_problem(image_features, text_features, logit_scale, logit_bias)
        if plain is not None:
            image, text, scale, bias = plain
            divisor = image.shape[0] if reduction == "mean" else 1
            p = Problem(image, text, scale, normalize=normalize)
            return sigmoid_pairs(p, bias, divisor=divisor, backend=backend, dtype=torch.float32)
    group = check_group(group)
    with reported(group, equal_shards, image_features):
        check_comm(comm)
        check_reduction(reduction, ("mean", "sum"))
    batch = prepare(
        image_features,
        text_features,
        logit_scale,
        more_scalars={"logit_bias": logit_bias},
        normalize=normalize,
        image_labels=image_labels,
        text_labels=text_labels,
        exclude_self=exclude_self,
        ignore_label=ignore_label,
        label_smoothing=0.0,
        negative_margin=negative_margin,
        group=group,
        comm=comm,
        agreed={"function": "sigmoid_loss", "reduction": reduction, "comm": comm},
        equal_shards=equal_shards,
        backend=backend,
        needs_positive=False,
    )
    return _of_batch(batch, reduction, comm, backend)


def _of_batch(batch: Batch, reduction: str, comm: str, backend: str | None) -> Tensor:
    p, bias, shards = batch.problem, batch.bias, batch.shards
    assert bias is not None
    images, _ = batch_size(p.image, p.text, shards)
    divisor = images if reduction == "mean" else 1
    if shards is None:
        return sigmoid_pairs(p, bias, divisor=divisor, backend=backend, dtype=p.scale.dtype)
    if comm == "ring":
        loss = ring_sigmoid_pairs(p, bias, divisor=divisor, backend=backend, sizes=shards.texts, group=shards.group)
    else:
        loss = sigmoid_pairs(with_all_texts(p, shards), bias, divisor=divisor, backend=backend)
    return (shards.ranks * loss).to(p.scale.dtype)
