"""The torch ops of the losses: schema, fake, autograd, autocast."""

from fastclip.ops.autocast import autocast_dtype, autocast_features, no_autocast
from fastclip.ops.contrastive import (
    Statistics,
    TopLogits,
    contrastive_maxima,
    contrastive_statistics,
    merge_logsumexp,
)
from fastclip.ops.sigmoid import sigmoid_pairs
from fastclip.ops.transforms import batched, transformed

__all__ = [
    "Statistics",
    "TopLogits",
    "autocast_dtype",
    "autocast_features",
    "batched",
    "contrastive_maxima",
    "contrastive_statistics",
    "merge_logsumexp",
    "no_autocast",
    "sigmoid_pairs",
    "transformed",
]
