"""Token ids of random texts."""

from __future__ import annotations

import torch
from torch import Tensor

from fastclip.models.config import ModelConfig
from fastclip.models.factory import tokenizer_of

WORDS = (
    "a the of with and in on near under over photo picture drawing view small large old young red blue green white "
    "black brown dog cat horse bird man woman child people house street tree grass river mountain beach car bicycle "
    "train boat table chair window door food plate bread fruit cup book flower garden morning evening summer winter "
    "light rain snow running standing sitting holding looking riding playing sleeping wooden stone bright quiet "
    "happy two three several"
)


def captions(count: int, model: str, config: ModelConfig, generator: torch.Generator) -> Tensor:
    """Return the token ids (count, L) of captions of 8 to 20 words."""
    tokenize = tokenizer_of(config, model)
    words = WORDS.split()
    counts = torch.randint(8, 21, (count,), generator=generator).tolist()
    return tokenize(
        [" ".join(words[k] for k in torch.randint(len(words), (n,), generator=generator).tolist()) for n in counts]
    )


def uniform(count: int, model: str, config: ModelConfig, generator: torch.Generator) -> Tensor:
    """Return random token ids (count, L); the number of tokens is uniform up to the context length L."""
    length, vocabulary = config.text_cfg.context_length, config.text_cfg.vocab_size
    ids = torch.randint(1, vocabulary - 1, (count, length), generator=generator)
    end = torch.randint(2, length, (count, 1), generator=generator)
    place = torch.arange(length)
    return torch.where(place < end, ids, 0).masked_fill_(place == end, vocabulary - 1)
