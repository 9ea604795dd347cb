"""CoSwin, Florence's image tower: timm's Swin Transformer with CvT's convolutions for patch embedding and merging."""

from __future__ import annotations

from typing import Any

from timm.layers import PatchEmbed
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from fastclip.models.config import CoSwinConfig

__all__ = ["ConvEmbed", "ConvMerging", "coswin"]


def coswin(config: CoSwinConfig, embed_dim: int) -> nn.Module:
    """Build a CoSwin tower with global average pooling and a projection (Yuan et al. 2021, section 2.2).

    The tower turns images (B, 3, H, W) into features (B, embed_dim).

    Raises:
        ValueError: the width is not a multiple of head_width, or image_size is not a multiple of 4.
    """
    if config.width % config.head_width:
        raise ValueError(f"width must be a multiple of head_width, got {config.width} and {config.head_width}")
    if config.image_size % ConvEmbed.stride:
        raise ValueError(f"image_size must be a multiple of {ConvEmbed.stride}, got {config.image_size}")
    tower = SwinTransformer(
        img_size=config.image_size,
        patch_size=ConvEmbed.stride,
        num_classes=0,
        embed_dim=config.width,
        depths=config.layers,
        num_heads=tuple(config.width * 2**stage // config.head_width for stage in range(len(config.layers))),
        window_size=config.window_size,
        drop_path_rate=config.drop_path,
        embed_layer=ConvEmbed,
    )
    for stage in range(1, len(config.layers)):
        tower.layers[stage].downsample = ConvMerging(config.width * 2 ** (stage - 1))
    tower.head.fc = nn.Linear(tower.num_features, embed_dim, bias=False)
    nn.init.normal_(tower.head.fc.weight, std=tower.num_features**-0.5)
    return tower


class ConvEmbed(PatchEmbed):
    """Patch embedding with overlapping 7 x 7 windows and LayerNorm (Wu et al. 2021, CvT).

    Images (B, 3, H, W) become (B, H/4, W/4, C).
    """

    stride = 4

    def __init__(self, *, in_chans: int = 3, embed_dim: int, **options: Any) -> None:
        super().__init__(in_chans=in_chans, embed_dim=embed_dim, **options)
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=7, stride=self.stride, padding=2)
        _init_convolution(self.proj)


class ConvMerging(nn.Module):
    """Patch merging with overlapping 3 x 3 windows and LayerNorm (Wu et al. 2021, CvT).

    Features (B, H, W, C) become (B, ceil(H/2), ceil(W/2), 2C).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, kernel_size=3, stride=2, padding=1)
        self.norm = nn.LayerNorm(2 * channels)
        _init_convolution(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.permute(0, 3, 1, 2))
        return self.norm(x.permute(0, 2, 3, 1))


def _init_convolution(conv: nn.Conv2d) -> None:
    assert conv.bias is not None
    nn.init.trunc_normal_(conv.weight, std=0.02)
    nn.init.zeros_(conv.bias)
