"""fastclip: the contrastive loss of CLIP-like training as a kernel package."""

from fastclip._backends import backends
from fastclip._version import __version__
from fastclip.loss import contrastive_loss
from fastclip.modules import ClipLoss

__all__ = ["ClipLoss", "__version__", "backends", "contrastive_loss"]
