"""The torch ops of the losses: schema, fake, autograd, autocast."""

from fastclip.ops.autocast import autocast_dtype, autocast_features
from fastclip.ops.contrastive import (
    Statistics,
    TopLogits,
    contrastive_maxima,
    contrastive_statistics,
    merge_logsumexp,
)
from fastclip.ops.sigmoid import sigmoid_pairs

__all__ = [
    "Statistics",
    "TopLogits",
    "autocast_dtype",
    "autocast_features",
    "contrastive_maxima",
    "contrastive_statistics",
    "merge_logsumexp",
    "sigmoid_pairs",
]
