"""ALIGN's text tower: transformers' BERT, read at [CLS]."""

from __future__ import annotations

import transformers
from torch import Tensor, nn

from fastclip.models.config import BertConfig
from fastclip.models.tokenizers.wordpiece import PAD_ID

__all__ = ["BertText"]


class BertText(nn.Module):
    """Jia et al. 2021, section 4.2: the last layer at [CLS] through a linear layer to the image tower's width.

    ``text.bert`` has transformers' names. Weights are drawn as BERT's (Devlin et al. 2019): normal of 0.02.
    """

    def __init__(self, config: BertConfig, embed_dim: int) -> None:
        super().__init__()
        if config.context_length > config.max_positions:
            raise ValueError(f"context_length {config.context_length} is over max_positions {config.max_positions}")
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
        """ids (B, L) integer, padded with [PAD] -> features (B, D), not normalised."""
        hidden = self.bert(ids, attention_mask=(ids != PAD_ID).long()).last_hidden_state
        return self.proj(hidden[:, 0])

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if enable:
            self.bert.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.bert.gradient_checkpointing_disable()
