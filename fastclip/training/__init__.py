"""Training of image and text towers with the contrastive loss."""

from fastclip.training.cached import cached_step

__all__ = ["cached_step"]
