"""fastclip: the contrastive losses of CLIP-like training as a kernel package."""

from fastclip._backends import backends, build_info
from fastclip._version import __version__
from fastclip.loss import contrastive_loss
from fastclip.modules import ClipLoss, SigLipLoss
from fastclip.multiview import multiview_loss
from fastclip.sigmoid import sigmoid_loss
from fastclip.stats import ContrastiveStats, contrastive_stats

__all__ = [
    "ClipLoss",
    "ContrastiveStats",
    "SigLipLoss",
    "__version__",
    "backends",
    "build_info",
    "contrastive_loss",
    "contrastive_stats",
    "multiview_loss",
    "sigmoid_loss",
]
