"""Training of image and text towers with the contrastive loss."""

from fastclip.training.cached import cached_step
from fastclip.training.planning import Plan, plan

__all__ = ["Plan", "cached_step", "plan"]
