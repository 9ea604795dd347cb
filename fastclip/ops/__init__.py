"""The torch ops of the losses: schema, fake, autograd, autocast."""

from fastclip.ops.autocast import autocast_dtype, autocast_features, autocasts, no_autocast
from fastclip.ops.contrastive import (
    Statistics,
    TopLogits,
    contrastive_maxima,
    contrastive_statistics,
    merge_logsumexp,
)
from fastclip.ops.plain import are_plain, plain_loss
from fastclip.ops.sigmoid import sigmoid_pairs
from fastclip.ops.transforms import batched, transformed

__all__ = [
    "Statistics",
    "TopLogits",
    "are_plain",
    "autocast_dtype",
    "autocast_features",
    "autocasts",
    "batched",
    "contrastive_maxima",
    "contrastive_statistics",
    "merge_logsumexp",
    "no_autocast",
    "plain_loss",
    "sigmoid_pairs",
    "transformed",
]
