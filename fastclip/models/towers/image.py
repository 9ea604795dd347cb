"""Image towers of CLIP and ALIGN, built from timm's modules and initialised as in the authors' code."""

from __future__ import annotations

from typing import Any

import timm
import torch.nn.functional as F
from timm.layers import QuickGELU
from timm.models import checkpoint_seq
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.efficientnet import EfficientNet
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastclip.models.config import EfficientNetConfig, ResNetConfig, ViTConfig

__all__ = ["efficientnet", "resnet", "vit"]


def vit(config: ViTConfig, embed_dim: int, *, quick_gelu: bool) -> nn.Module:
    """Build CLIP's ViT, images (B, 3, H, W) -> (B, embed_dim): the class token after a projection without bias.

    Raises:
        ValueError: the width is not a multiple of head_width, or image_size is not a multiple of patch_size.
    """
    width = config.width
    if width % config.head_width:
        raise ValueError(f"width must be a multiple of head_width, got {width} and {config.head_width}")
    if config.image_size % config.patch_size:
        raise ValueError(f"image_size must be a multiple of patch_size {config.patch_size}, got {config.image_size}")
    tower = _ClassTokenViT(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=width,
        depth=config.layers,
        num_heads=width // config.head_width,
        mlp_ratio=config.mlp_ratio,
        drop_path_rate=config.drop_path,
        pre_norm=True,
        norm_layer=nn.LayerNorm,
        act_layer=QuickGELU if quick_gelu else nn.GELU,
        num_classes=0,
        weight_init="skip",
        block_fn=_ClassTokenBlock,
    )
    tower.head = nn.Linear(width, embed_dim, bias=False)
    # As in the authors' code, the class token, the position embeddings and the projection have a standard deviation of
    # width ** -0.5. Attention is initialised as in torch's MultiheadAttention, and all other layers have torch's
    # defaults.
    for parameter in (tower.cls_token, tower.pos_embed, tower.head.weight):
        assert parameter is not None
        nn.init.normal_(parameter, std=width**-0.5)
    for block in tower.blocks:
        nn.init.xavier_uniform_(block.attn.qkv.weight)
        nn.init.zeros_(block.attn.qkv.bias)
        nn.init.zeros_(block.attn.proj.bias)
    return tower


class _ClassTokenViT(VisionTransformer):
    """timm's ViT with a faster `forward`, whose last block computes the class token only: the head reads no other."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        *blocks, last = self.blocks
        if self.grad_checkpointing:
            x = checkpoint_seq(blocks, x)
            x = checkpoint(last, x, class_token_only=True, use_reentrant=False)
        else:
            for block in blocks:
                x = block(x)
            x = last(x, class_token_only=True)
        return self.forward_head(self.norm(x))


class _ClassTokenBlock(Block):
    def forward(self, x: Tensor, *rest: Any, class_token_only: bool = False, **options: Any) -> Tensor:
        """Return the output for all tokens (B, N, width), or (B, 1, width) for the class token, which is the first.

        For a single token, three quarters of the products are saved.
        """
        if not class_token_only:
            return super().forward(x, *rest, **options)
        token = x[:, :1] + self.drop_path1(self.ls1(self._attend(self.norm1(x))))
        return token + self.drop_path2(self.ls2(self.mlp(self.norm2(token))))

    def _attend(self, x: Tensor) -> Tensor:
        """Return the attention of the class token to all tokens (B, 1, width), of tokens (B, N, width)."""
        B, N, width = x.shape
        q, k, v = self.attn.qkv(x).view(B, N, 3, self.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q[:, :, :1], k, v)
        return self.attn.proj(out.reshape(B, 1, width))


def resnet(config: ResNetConfig, embed_dim: int) -> nn.Module:
    """Build CLIP's ResNet, images (B, 3, H, W) -> (B, embed_dim), with attention pooling."""
    width = config.width
    stages = tuple(
        ByoBlockCfg(type="bottle", d=depth, c=4 * width * 2**stage, s=1 if stage == 0 else 2, br=0.25)
        for stage, depth in enumerate(config.layers)
    )
    parts = ByoModelCfg(
        blocks=stages,
        stem_type="",
        stem_chs=(width // 2, width // 2, width),
        stem_pool="avg2",
        downsample="avg",
        aa_layer="avg",
        head_type="attn_abs",
    )
    tower = ByobNet(parts, num_classes=embed_dim, img_size=config.image_size)
    for module in tower.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    # Blocks need no further initialisation: timm initialises residual blocks as the identity, as CLIP does.
    pool = tower.head
    for linear in (pool.q, pool.k, pool.v, pool.proj):
        linear.reset_parameters()
        nn.init.normal_(linear.weight, std=pool.in_features**-0.5)
    nn.init.normal_(pool.pos_embed, std=pool.in_features**-0.5)
    return tower


def efficientnet(config: EfficientNetConfig, embed_dim: int) -> nn.Module:
    """Build ALIGN's EfficientNet, images (B, 3, H, W) -> (B, embed_dim): the mean of the last features over positions.

    Raises:
        ValueError: timm has no EfficientNet of this name, or its width is not `embed_dim`.
    """
    if not timm.is_model(config.timm_model_name):  # timm would try to download a model called "hf-hub:..."
        raise ValueError(f"timm has no model called {config.timm_model_name!r}")
    tower = timm.create_model(config.timm_model_name, num_classes=0, drop_path_rate=config.drop_path)
    if not isinstance(tower, EfficientNet):
        raise ValueError(f"timm_model_name {config.timm_model_name!r} is not an EfficientNet")
    width = tower.conv_head.in_channels
    if width != embed_dim:
        raise ValueError(
            f"embed_dim must be {width}, the number of features of {config.timm_model_name} before its head, "
            f"got {embed_dim}"
        )
    tower.conv_head, tower.bn2 = nn.Identity(), nn.Identity()
    tower.num_features = tower.head_hidden_size = width
    if config.depthwise_padding is not None:
        tower.conv_stem = _PaddedConv2d(tower.conv_stem, both_sides=False)
        for number, block in enumerate(block for stage in tower.blocks for block in stage):
            if block.conv_dw.stride == (2, 2):
                block.conv_dw = _PaddedConv2d(block.conv_dw, both_sides=number in config.depthwise_padding)
    return tower


class _PaddedConv2d(nn.Conv2d):
    """Convolution of kernel size k with fixed zero padding.

    The padding is k // 2 pixels on the right and at the bottom. On the left and at the top it is k // 2 pixels with
    `both_sides`, and one pixel less without. Unlike TensorFlow's padding, it does not depend on the size of the input.
    """

    def __init__(self, conv: nn.Conv2d, *, both_sides: bool) -> None:
        size = conv.kernel_size[0]
        super().__init__(
            conv.in_channels, conv.out_channels, size, conv.stride[0], groups=conv.groups, bias=conv.bias is not None
        )
        self.weight, self.bias = conv.weight, conv.bias
        before, after = (size // 2 if both_sides else size // 2 - 1), size // 2
        self.sides = (before, after, before, after)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self.sides))
