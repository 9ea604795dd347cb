"""Training of image and text towers with the contrastive loss."""

from typing import TYPE_CHECKING

from fastclip._lazy import lazy_names

if TYPE_CHECKING:
    from fastclip.training.cached import cached_step
    from fastclip.training.options import TrainOptions
    from fastclip.training.signals import Interrupted
    from fastclip.training.trainer import Run, train

__all__ = ["Interrupted", "Run", "TrainOptions", "cached_step", "train"]

_LAZY = {
    "Interrupted": "fastclip.training.signals",
    "Run": "fastclip.training.trainer",
    "TrainOptions": "fastclip.training.options",
    "cached_step": "fastclip.training.cached",
    "train": "fastclip.training.trainer",
}
__getattr__ = lazy_names(globals(), _LAZY)


def __dir__() -> list[str]:
    return __all__
