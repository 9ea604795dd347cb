"""fastclip: fused kernels for the contrastive losses of CLIP-like training.

If torch is already imported, ``import fastclip`` imports the losses too. Otherwise they are imported on first use, like
all other names, so that the command line does not wait for torch. A program that runs an exported graph with fastclip's
ops but uses no name of this package must ``import torch`` before ``import fastclip``, or ``import fastclip.ops``.
"""

import sys
from typing import TYPE_CHECKING, Any

from fastclip._version import __version__
from fastclip.system.lazy import lazy_names

# With torch loaded, the ops must be registered at once, and torch.compile must not trace into a lazy import.
if TYPE_CHECKING or "torch" in sys.modules:
    from fastclip._backends import backends, build_info
    from fastclip.losses.contrastive import contrastive_loss
    from fastclip.losses.distillation import distillation_loss
    from fastclip.losses.global_contrastive import GlobalContrastiveLoss
    from fastclip.losses.hard_negatives import HardestNegatives, hardest_negatives
    from fastclip.losses.logit_statistics import LogitStatistics, logit_statistics
    from fastclip.losses.matryoshka import matryoshka_loss
    from fastclip.losses.modules import ClipLoss, DistillClipLoss, SigLipLoss
    from fastclip.losses.multiview import multiview_loss
    from fastclip.losses.sigmoid import sigmoid_loss
    from fastclip.losses.stats import ContrastiveStats, contrastive_stats

if TYPE_CHECKING:
    from fastclip.models.config import list_models
    from fastclip.models.dual_encoder import DualEncoder
    from fastclip.models.factory import create_model, create_model_and_transforms, get_tokenizer, load_image_transform

__all__ = [
    "ClipLoss",
    "ContrastiveStats",
    "DistillClipLoss",
    "DualEncoder",
    "GlobalContrastiveLoss",
    "HardestNegatives",
    "LogitStatistics",
    "SigLipLoss",
    "__version__",
    "backends",
    "build_info",
    "contrastive_loss",
    "contrastive_stats",
    "create_model",
    "create_model_and_transforms",
    "distillation_loss",
    "get_tokenizer",
    "hardest_negatives",
    "list_models",
    "load_image_transform",
    "logit_statistics",
    "matryoshka_loss",
    "multiview_loss",
    "sigmoid_loss",
]

_LAZY = {
    "ClipLoss": "fastclip.losses.modules",
    "ContrastiveStats": "fastclip.losses.stats",
    "DistillClipLoss": "fastclip.losses.modules",
    "DualEncoder": "fastclip.models.dual_encoder",
    "GlobalContrastiveLoss": "fastclip.losses.global_contrastive",
    "HardestNegatives": "fastclip.losses.hard_negatives",
    "LogitStatistics": "fastclip.losses.logit_statistics",
    "SigLipLoss": "fastclip.losses.modules",
    "backends": "fastclip._backends",
    "build_info": "fastclip._backends",
    "contrastive_loss": "fastclip.losses.contrastive",
    "contrastive_stats": "fastclip.losses.stats",
    "create_model": "fastclip.models.factory",
    "create_model_and_transforms": "fastclip.models.factory",
    "distillation_loss": "fastclip.losses.distillation",
    "get_tokenizer": "fastclip.models.factory",
    "hardest_negatives": "fastclip.losses.hard_negatives",
    "list_models": "fastclip.models.config",
    "load_image_transform": "fastclip.models.factory",
    "logit_statistics": "fastclip.losses.logit_statistics",
    "matryoshka_loss": "fastclip.losses.matryoshka",
    "multiview_loss": "fastclip.losses.multiview",
    "sigmoid_loss": "fastclip.losses.sigmoid",
}
_find = lazy_names(globals(), _LAZY)


def __getattr__(name: str) -> Any:
    try:
        return _find(name)
    except ImportError as error:
        if not _LAZY[name].startswith("fastclip.models."):
            raise
        # The encoders need timm and transformers, which the losses do not.
        what = f"fastclip.{name} needs {error.name or error}, which is not installed"
        from fastclip.system.installed import install_advice

        raise ImportError(f"{what}: {install_advice('models')}", name=error.name) from error


def __dir__() -> list[str]:
    return __all__
