"""Training of image and text towers with the contrastive loss."""

from typing import TYPE_CHECKING

from fastclip.system.lazy import lazy_names

if TYPE_CHECKING:
    from fastclip.training.options import TrainOptions
    from fastclip.training.planning.memory import Plan, plan
    from fastclip.training.signals import Interrupted
    from fastclip.training.step.cached import cached_step
    from fastclip.training.trainer import Run, train

__all__ = ["Interrupted", "Plan", "Run", "TrainOptions", "cached_step", "plan", "train"]

_LAZY = {
    "Interrupted": "fastclip.training.signals",
    "Plan": "fastclip.training.planning.memory",
    "Run": "fastclip.training.trainer",
    "TrainOptions": "fastclip.training.options",
    "cached_step": "fastclip.training.step.cached",
    "plan": "fastclip.training.planning.memory",
    "train": "fastclip.training.trainer",
}
__getattr__ = lazy_names(globals(), _LAZY)


def __dir__() -> list[str]:
    return __all__
