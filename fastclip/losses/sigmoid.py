"""The sigmoid loss of SigLIP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastclip.distributed import check_comm, check_group, gather_rows, meet, reported, ring_sigmoid_pairs
from fastclip.losses.arguments import check_features, check_reduction, check_shard, flag, plain_problem, scalar
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
    """Pairwise sigmoid loss over the N x N similarities of images and texts, never stored.

    -sum_ij logsigmoid(+-(logit_scale <image_i, text_j> + logit_bias)) / N, plus at the pairs i = j and minus at all
    others (SigLIP, Zhai et al. 2023, section 3.2), of the normalised features unless ``normalize=False``.

    Where gradients are wanted they are computed with the loss, in the same pass: between forward and backward the
    graph holds one gradient as large as the features, of float16 features in float32.

    Args:
        image_features, text_features: (N, D), float32, bfloat16, float16 or float64, on one device. Text i belongs to
            image i.
        logit_scale: what multiplies the cosines, already exponentiated (SigLIP starts at 10): a number, or a tensor of
            one element (its gradient is computed).
        logit_bias: what is added to every logit (SigLIP starts at -10): likewise.
        normalize: divide each row by its norm (at least 1e-12, so that zero rows stay finite), with gradient.
        reduction: "mean", the sum over all pairs divided by N as in SigLIP; or "sum".
        group, comm, equal_shards: the loss over the shards of several processes, as in `contrastive_loss`: a rank
            returns the sum over its images' pairs with all texts, divided by the mean number of images of a rank
            ("sum": times the ranks).
        backend: a name from `fastclip.backends()`; None takes the best that serves these features, and the reference
            (dense torch, which stores the matrix) under torch.func's transforms and for forward-mode derivatives.

    Returns:
        A scalar; float32, for float64 features float64.

    Raises:
        ValueError: shapes, devices or options that do not fit.
        TypeError: features that are not floating tensors of one dtype.
        RuntimeError: an explicit backend that cannot serve; a group without torch.distributed, or under torch.func.
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
