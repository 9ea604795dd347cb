"""Image and text towers, tokenizers, image transforms, and the reading and writing of checkpoints."""

from typing import TYPE_CHECKING

from fastclip.system.lazy import lazy_names

if TYPE_CHECKING:
    from fastclip.models.config import list_models
    from fastclip.models.dual_encoder import DualEncoder
    from fastclip.models.factory import create_model, create_model_and_transforms, get_tokenizer, load_image_transform

__all__ = [
    "DualEncoder",
    "create_model",
    "create_model_and_transforms",
    "get_tokenizer",
    "list_models",
    "load_image_transform",
]

_LAZY = {
    "DualEncoder": "fastclip.models.dual_encoder",
    "create_model": "fastclip.models.factory",
    "create_model_and_transforms": "fastclip.models.factory",
    "get_tokenizer": "fastclip.models.factory",
    "list_models": "fastclip.models.config",
    "load_image_transform": "fastclip.models.factory",
}
__getattr__ = lazy_names(globals(), _LAZY)


def __dir__() -> list[str]:
    return __all__
