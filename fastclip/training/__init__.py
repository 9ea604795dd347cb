"""Training of image and text towers with the contrastive loss."""

from typing import TYPE_CHECKING

from fastclip._lazy import lazy_names

if TYPE_CHECKING:
    from fastclip.training.cached import cached_step

__all__ = ["cached_step"]

_LAZY = {"cached_step": "fastclip.training.cached"}
__getattr__ = lazy_names(globals(), _LAZY)


def __dir__() -> list[str]:
    return __all__
