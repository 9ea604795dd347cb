"""The sigmoid loss of SigLIP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastclip.distributed import check_comm, check_group, gather_rows, meet, reported, ring_sigmoid_pairs
from fastclip.losses.inputs.arguments import check_features, check_reduction, check_shard, flag, plain_problem, scalar
from fastclip.ops import autocast_features, sigmoid_pairs

__all__ = ["sigmoid_loss"]


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    group: Any = None,
    comm: str = "gather",
    equal_shards: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Compute the pairwise sigmoid loss over the N x N similarities of images and texts, in bounded memory.

    The loss is ``-sum_ij logsigmoid(sign_ij * (logit_scale * <image_i, text_j> + logit_bias)) / N``, where sign_ij is 1
    at the pairs i = j and -1 elsewhere (SigLIP, Zhai et al. 2023, section 3.2). Features are normalised unless
    ``normalize=False``.

    If gradients are needed, they are computed in the same pass as the loss. Between the forward and the backward pass
    the graph holds the gradients of both feature matrices, which are as large as the features (in float32 for float16
    features).

    Args:
        image_features, text_features: (N, D), float32, bfloat16, float16 or float64, on one device. Text i belongs to
            image i.
        logit_scale: factor of the cosines, already exponentiated (SigLIP starts at 10). A number, or a tensor of one
            element, which receives a gradient if it requires one.
        logit_bias: number added to every logit (SigLIP starts at -10), of the same types as ``logit_scale``.
        normalize: divide each row by its norm (at least 1e-12, so that zero rows stay finite). The gradient passes
            through the division.
        reduction: "mean", the sum over all pairs divided by N as in SigLIP, or "sum".
        group, comm, equal_shards: compute the loss over the shards of several processes, as in `contrastive_loss`. With
            "mean" a rank returns the sum over the pairs of its images with all texts, divided by the mean number of
            images per rank. With "sum" it returns that sum times the number of ranks.
        backend: a name from `fastclip.backends()`. None chooses the best one that supports these features. Under
            torch.func transforms and forward-mode derivatives it chooses the reference (plain torch, which stores the
            N x N matrix).

    Returns:
        A scalar, float32, or float64 for float64 features.

    Raises:
        ValueError: shapes, devices or options do not fit.
        TypeError: the features are not floating-point tensors of one dtype.
        RuntimeError: the named backend does not support these features, ``group`` is given without torch.distributed,
            or ``group`` is used under torch.func.
    """
    options: dict[str, Any] = {"normalize": normalize, "backend": backend}
    if (
        group is None
        and comm == "gather"
        and reduction in ("mean", "sum")
        and type(normalize) is bool
        and logit_bias is not None
    ):
        problem = plain_problem(image_features, text_features, logit_scale, logit_bias)
        if problem is not None:
            divisor = problem[0].shape[0] if reduction == "mean" else 1
            return sigmoid_pairs(*problem, divisor=divisor, dtype=torch.float32, **options)
    group = check_group(group)
    with reported(group, equal_shards, image_features):
        check_comm(comm)
        check_reduction(reduction, ("mean", "sum"))
        normalize = flag("normalize", normalize)
        may_be_empty = group is not None and not equal_shards  # a rank may have no row
        check_features(image_features, text_features, paired=True, backend=backend, may_be_empty=may_be_empty)
        scale = scalar("logit_scale", logit_scale, image_features)
        bias = scalar("logit_bias", logit_bias, image_features)
        image, text, scale, bias = autocast_features(image_features, text_features, scale, bias)
        if group is not None:
            check_shard(backend, image, text, scale, bias)
    options["normalize"] = normalize
    if group is None:
        divisor = image.shape[0] if reduction == "mean" else 1
        return sigmoid_pairs(image, text, scale, bias, divisor=divisor, dtype=scale.dtype, **options)
    agreed = {"function": "sigmoid_loss", "reduction": reduction, "comm": comm, "normalize": normalize}
    scalars = {"logit_scale": scale, "logit_bias": bias}
    shards = meet(group, image, text, scalars, agreed, equal_shards)
    options["divisor"] = sum(shards.texts) if reduction == "mean" else 1
    if comm == "ring":
        loss = ring_sigmoid_pairs(image, text, scale, bias, sizes=shards.texts, group=shards.group, **options)
    else:
        texts = gather_rows(text, shards.texts, shards.group)
        loss = sigmoid_pairs(image, texts, scale, bias, offset=shards.own_texts.start, **options)
    return (shards.ranks * loss).to(scale.dtype)
