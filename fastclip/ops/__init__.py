"""The torch ops of the losses, with their schemas, fake implementations, autograd formulas and autocast rules."""

from fastclip.ops.autocast import autocast_dtype, autocast_features, autocasts, no_autocast
from fastclip.ops.contrastive import contrastive_maxima, contrastive_statistics, merge_logsumexp
from fastclip.ops.direction import one_direction, one_pass
from fastclip.ops.distillation import distillation_statistics
from fastclip.ops.plain import plain_loss
from fastclip.ops.sigmoid import sigmoid_pairs
from fastclip.ops.transforms import TENSORS, batched, recorded, transformed

__all__ = [
    "TENSORS",
    "autocast_dtype",
    "autocast_features",
    "autocasts",
    "batched",
    "contrastive_maxima",
    "contrastive_statistics",
    "distillation_statistics",
    "merge_logsumexp",
    "no_autocast",
    "one_direction",
    "one_pass",
    "plain_loss",
    "recorded",
    "sigmoid_pairs",
    "transformed",
]
