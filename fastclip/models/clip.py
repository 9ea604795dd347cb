"""CLIP: an image tower and a text tower that meet in one embedding space."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fastclip.models.text import TextTransformer
from fastclip.models.tokenizer import CONTEXT_LENGTH

__all__ = ["CLIP", "MAX_LOG_SCALE", "vit_tiny"]

MAX_LOG_SCALE = math.log(100)  # Radford et al. 2021, section 2.5: the logits are scaled by 100 at most


class CLIP(nn.Module):
    """Radford et al. 2021, figure 3; state dict keys ``visual.``, ``text.`` and ``logit_scale``.

    Args:
        visual: images (B, C, H, W) -> features (B, D).
        text: token ids (B, L) -> features (B, D) of the same D.
    """

    def __init__(self, visual: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        self.text = text
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # stored as its logarithm

    def encode_image(self, images: Tensor, *, normalize: bool = False) -> Tensor:
        """images (B, C, H, W) float -> features (B, D), of unit length with ``normalize``."""
        features = self.visual(images)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, ids: Tensor, *, normalize: bool = False) -> Tensor:
        """Token ids (B, L) -> features (B, D), of unit length with ``normalize``."""
        features = self.text(ids)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised image features (M, D), normalised text features (N, D), and the exponentiated logit scale."""
        image_features = self.encode_image(images, normalize=True)
        text_features = self.encode_text(ids, normalize=True)
        return image_features, text_features, self.logit_scale.exp()


def vit_tiny(*, context_length: int = CONTEXT_LENGTH) -> CLIP:
    """A CLIP of 2.2 M parameters for 32 x 32 grey images, which a CPU trains in under a minute.

    The vocabulary's embeddings are 1.6 M of them. Weights are drawn from torch's global generator.
    """
    embed_dim = 64
    visual = VisionTransformer(
        img_size=32,
        patch_size=8,
        in_chans=1,
        num_classes=embed_dim,
        embed_dim=128,
        depth=3,
        num_heads=4,
        global_pool="avg",
        class_token=False,
    )
    assert visual.pos_embed is not None
    # As loud as the patches. From timm's 0.02 the tower takes twice the steps, the first of them to tell places apart.
    nn.init.normal_(visual.pos_embed, std=0.3)
    text = TextTransformer(width=32, layers=2, heads=2, output_dim=embed_dim, context_length=context_length)
    return CLIP(visual, text)
