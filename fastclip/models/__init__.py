"""Image and text towers, tokenizers, transforms, and the checkpoints that they are loaded from."""

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
