"""CLIP's text tower: a causal Transformer whose output is read at the end-of-text token.

Parameters are named as in open_clip's TextTransformer, so that its weights load without conversion.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from timm.layers import QuickGELU
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastclip.models.tokenizers.clip import CONTEXT_LENGTH

__all__ = ["TextTransformer"]


class TextTransformer(nn.Module):
    """Causal Transformer with pre-LayerNorm blocks, a final LayerNorm and a linear projection.

    The architecture is that of Radford et al. 2021, section 2.4, with the initialisation of the authors' code. The
    end-of-text token is the token with the largest id of a text. The padding after it does not influence the features,
    because attention looks only backwards.

    Args:
        width: width of the residual stream, a multiple of ``heads``.
        layers: number of blocks.
        heads: attention heads per block (CLIP: width / 64).
        output_dim: D, the length of the features.
        context_length: maximum number of tokens per text.
        vocab_size: number of token ids.
        quick_gelu: use x sigmoid(1.702 x) in place of GELU, as OpenAI's weights need.

    Raises:
        ValueError: the width is not a multiple of the heads.
    """

    def __init__(
        self,
        *,
        width: int,
        layers: int,
        heads: int,
        output_dim: int,
        context_length: int = CONTEXT_LENGTH,
        vocab_size: int = 49408,
        quick_gelu: bool = False,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got width={width} and heads={heads}")
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.transformer = _Transformer(width, layers, heads, quick_gelu)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, output_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """Return features (B, D), not normalised, of token ids (B, L), where L is at most the context length."""
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        return self.ln_final(self.transformer(x, ids.argmax(dim=1))) @ self.text_projection

    def lengths(self, ids: Tensor) -> Tensor:
        """Return the number of tokens (B,) of token ids (B, L) up to the end-of-text token, the last that matters."""
        return ids.argmax(dim=1) + 1

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.transformer.grad_checkpointing = enable


class _Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, quick_gelu: bool) -> None:
        super().__init__()
        added_std = (2 * layers * width) ** -0.5  # each of the 2 * layers residual branches adds to the stream
        self.resblocks = nn.ModuleList(_Block(width, heads, added_std, quick_gelu) for _ in range(layers))
        self.grad_checkpointing = False

    def forward(self, x: Tensor, last: Tensor) -> Tensor:
        """Return the output (B, width) for token `last` (B,) of each text, from the embedded tokens (B, L, width)."""
        for number, block in enumerate(self.resblocks, start=1):
            arguments = (x, last) if number == len(self.resblocks) else (x,)
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
        return x


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, added_std: float, quick_gelu: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = _CausalAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        c_fc, c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        gelu = QuickGELU() if quick_gelu else nn.GELU()
        self.mlp = nn.Sequential(OrderedDict(c_fc=c_fc, gelu=gelu, c_proj=c_proj))
        nn.init.normal_(self.attn.out_proj.weight, std=added_std)
        nn.init.normal_(c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(c_proj.weight, std=added_std)

    def forward(self, x: Tensor, last: Tensor | None = None) -> Tensor:
        """Return the output for all tokens (B, L, width), or (B, width) for token `last` (B,) of each text.

        The last block of a tower needs a single token, which saves three quarters of that block's products.
        """
        attended = self.attn(self.ln_1(x), last)
        x = attended + (x if last is None else _select(x, last))
        return x + self.mlp(self.ln_2(x))


class _CausalAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        nn.init.normal_(self.in_proj_weight, std=width**-0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, last: Tensor | None) -> Tensor:
        B, L, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(B, L, 3, self.heads, width // self.heads)
        if last is None:
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out_proj(out.transpose(1, 2).reshape(B, L, width))
        k, v = qkv[:, :, 1:].permute(2, 0, 3, 1, 4)
        q = _select(qkv[:, :, 0], last)[:, :, None]  # (B, heads, 1, width / heads)
        seen = torch.arange(L, device=x.device) <= last[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None])
        return self.out_proj(out.reshape(B, width))


def _select(x: Tensor, places: Tensor) -> Tensor:
    """Return x[b, places[b]] for every b, where x is (B, L, ...) and places (B,)."""
    return x[torch.arange(len(x), device=x.device), places]
