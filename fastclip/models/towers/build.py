"""Build the towers of a configuration; imports timm, and transformers only for a model with BERT."""

from __future__ import annotations

from torch import nn

from fastclip.models.config import BertConfig, CoSwinConfig, EfficientNetConfig, ModelConfig, ResNetConfig
from fastclip.models.towers.coswin import coswin
from fastclip.models.towers.image import efficientnet, resnet, vit
from fastclip.models.towers.text import TextTransformer

__all__ = ["image_tower", "text_tower"]


def image_tower(config: ModelConfig) -> nn.Module:
    """Build the image tower of a configuration, images (B, 3, H, W) -> features (B, embed_dim), with new weights."""
    image = config.vision_cfg
    if isinstance(image, ResNetConfig):
        return resnet(image, config.embed_dim)
    if isinstance(image, EfficientNetConfig):
        return efficientnet(image, config.embed_dim)
    if isinstance(image, CoSwinConfig):
        return coswin(image, config.embed_dim)
    return vit(image, config.embed_dim, quick_gelu=config.quick_gelu)


def text_tower(config: ModelConfig) -> nn.Module:
    """Build the text tower of a configuration, token ids (B, L) -> features (B, embed_dim), with new weights."""
    text = config.text_cfg
    if isinstance(text, BertConfig):
        from fastclip.models.towers.bert import BertText  # imports transformers

        return BertText(text, config.embed_dim)
    return TextTransformer(
        width=text.width,
        layers=text.layers,
        heads=text.heads,
        output_dim=config.embed_dim,
        context_length=text.context_length,
        vocab_size=text.vocab_size,
        quick_gelu=config.quick_gelu,
    )
