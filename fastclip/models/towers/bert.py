"""ALIGN's text tower: BERT from transformers, whose output at [CLS] represents the text."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn

from fastclip.models.config import BertConfig
from fastclip.models.tokenizers.wordpiece import PAD_ID

__all__ = ["BertText"]


class BertText(nn.Module):
    """BERT with a linear layer from the last hidden state at [CLS] to the image tower's width.

    The architecture is described in Jia et al. 2021, section 4.2. Parameters below ``text.bert`` have the same names as
    in the library transformers. They are initialised as in BERT (Devlin et al. 2019), from a normal distribution with a
    standard deviation of 0.02.

    Args:
        config: options of the tower.
        embed_dim: D, the length of the features.

    Raises:
        ValueError: context_length exceeds max_positions.
    """

    def __init__(self, config: BertConfig, embed_dim: int) -> None:
        super().__init__()
        if config.context_length > config.max_positions:
            raise ValueError(
                f"context_length must be at most max_positions {config.max_positions}, got {config.context_length}"
            )
        sizes = transformers.BertConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.width,
            max_position_embeddings=config.max_positions,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
            pad_token_id=PAD_ID,
        )
        self.bert = transformers.BertModel(sizes, add_pooling_layer=False)
        self.proj = nn.Linear(config.width, embed_dim)
        nn.init.normal_(self.proj.weight, std=sizes.initializer_range)
        nn.init.zeros_(self.proj.bias)

    def forward(self, ids: Tensor) -> Tensor:
        """Return features (B, D), not normalised, of token ids (B, L) that are padded with [PAD]."""
        hidden = self.bert(ids, attention_mask=(ids != PAD_ID).long()).last_hidden_state
        return self.proj(hidden[:, 0])

    def lengths(self, ids: Tensor) -> Tensor:
        """Return the number of tokens (B,) of token ids (B, L) up to the last one that is not [PAD], at least 1."""
        places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        return ((ids != PAD_ID) * places).amax(dim=1).clamp(min=1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if enable:
            self.bert.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.bert.gradient_checkpointing_disable()
