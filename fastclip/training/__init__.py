"""Training of image and text towers with the contrastive loss."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastclip.training.cached import cached_step
    from fastclip.training.options import TrainOptions
    from fastclip.training.trainer import Run, train

__all__ = ["Run", "TrainOptions", "cached_step", "train"]


def __getattr__(name: str) -> Any:
    # Imported when they are asked for: `fastclip train --help` does without torch, cached_step without timm.
    if name == "cached_step":
        from fastclip.training.cached import cached_step as found
    elif name == "TrainOptions":
        from fastclip.training.options import TrainOptions as found
    elif name in ("Run", "train"):
        from fastclip.training import trainer

        return getattr(trainer, name)
    else:
        raise AttributeError(f"module 'fastclip.training' has no attribute {name!r}")
    return found
