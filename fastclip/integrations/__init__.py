"""Patches by which other packages train with fastclip's losses, without a change to the training code."""

from typing import TYPE_CHECKING

from fastclip.system.lazy import lazy_names

if TYPE_CHECKING:
    from fastclip.integrations.open_clip import patch_open_clip
    from fastclip.integrations.patching import unpatch
    from fastclip.integrations.transformers import patch_transformers

__all__ = ["patch_open_clip", "patch_transformers", "unpatch"]

_LAZY = {
    "patch_open_clip": "fastclip.integrations.open_clip",
    "patch_transformers": "fastclip.integrations.transformers",
    "unpatch": "fastclip.integrations.patching",
}
__getattr__ = lazy_names(globals(), _LAZY)


def __dir__() -> list[str]:
    return __all__
