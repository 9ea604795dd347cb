"""fastclip: the contrastive losses of CLIP-like training as a kernel package."""

from typing import TYPE_CHECKING, Any

from fastclip._backends import backends, build_info
from fastclip._version import __version__
from fastclip.loss import contrastive_loss
from fastclip.modules import ClipLoss, SigLipLoss
from fastclip.multiview import multiview_loss
from fastclip.sigmoid import sigmoid_loss
from fastclip.stats import ContrastiveStats, contrastive_stats

if TYPE_CHECKING:
    from fastclip.models import (
        DualEncoder,
        create_model,
        create_model_and_transforms,
        get_tokenizer,
        list_models,
        load_image_transform,
    )

__all__ = [
    "ClipLoss",
    "ContrastiveStats",
    "DualEncoder",
    "SigLipLoss",
    "__version__",
    "backends",
    "build_info",
    "contrastive_loss",
    "contrastive_stats",
    "create_model",
    "create_model_and_transforms",
    "get_tokenizer",
    "list_models",
    "load_image_transform",
    "multiview_loss",
    "sigmoid_loss",
]

# The encoders need timm and transformers, which the losses do not: they are imported when they are asked for.
_MODELS = (
    "DualEncoder",
    "create_model",
    "create_model_and_transforms",
    "get_tokenizer",
    "list_models",
    "load_image_transform",
)


def __getattr__(name: str) -> Any:
    if name not in _MODELS:
        raise AttributeError(f"module 'fastclip' has no attribute {name!r}")
    try:
        from fastclip import models
    except ImportError as error:
        what = f"fastclip.{name} needs {error.name or error}, which is not installed"
        raise ImportError(f"{what}: pip install '.[models]' in the clone", name=error.name) from error
    return getattr(models, name)


def __dir__() -> list[str]:
    return __all__
