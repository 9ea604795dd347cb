"""The last block of CLIP's towers computes the token that the head reads, and no other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from support import needs

needs("models")

from fastclip.models.config import ViTConfig
from fastclip.models.towers.image import vit
from fastclip.models.towers.text import TextTransformer

WIDTH, LENGTH, VOCABULARY = 32, 12, 50


def image_tower(*, drop_path: float = 0.0) -> nn.Module:
    sizes = {"image_size": 16, "layers": 2, "width": WIDTH, "patch_size": 4, "head_width": 8}
    return vit(ViTConfig(**sizes, drop_path=drop_path), 24, quick_gelu=False).double()


def all_patches(tower: nn.Module, images: Tensor) -> Tensor:
    return tower.forward_head(tower.forward_features(images))


def text_tower() -> TextTransformer:
    sizes = {"width": WIDTH, "layers": 2, "heads": 4, "output_dim": 24}
    return TextTransformer(**sizes, context_length=LENGTH, vocab_size=VOCABULARY).double()


def all_tokens(tower: TextTransformer, ids: Tensor) -> Tensor:
    x = tower.token_embedding(ids) + tower.positional_embedding
    for block in tower.transformer.resblocks:
        x = block(x)
    return tower.ln_final(x[torch.arange(len(ids)), ids.argmax(dim=1)]) @ tower.text_projection


def texts() -> Tensor:
    """Return texts whose end is at every place but the first, followed by other tokens."""
    ids = torch.randint(1, VOCABULARY - 1, (LENGTH - 1, LENGTH))
    ids[torch.arange(LENGTH - 1), torch.arange(1, LENGTH)] = VOCABULARY - 1
    return ids


def features_and_gradients(tower: nn.Module, forward: nn.Module, *arguments: object) -> dict[str, Tensor]:
    tower.zero_grad()
    torch.manual_seed(1)  # of stochastic depth
    features = forward(*arguments)
    features.sin().sum().backward()
    return {"features": features.detach()} | {name: p.grad for name, p in tower.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_the_class_token_is_that_of_all_patches(drop_path: float, checkpointing: bool) -> None:
    torch.manual_seed(0)
    tower, images = image_tower(drop_path=drop_path), torch.rand(5, 3, 16, 16, dtype=torch.float64)
    expected = features_and_gradients(tower, all_patches, tower, images)
    tower.set_grad_checkpointing(checkpointing)
    torch.testing.assert_close(features_and_gradients(tower, tower, images), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_end_of_a_text_is_that_of_all_tokens(checkpointing: bool) -> None:
    torch.manual_seed(0)
    tower, ids = text_tower(), texts()
    expected = features_and_gradients(tower, all_tokens, tower, ids)
    tower.set_grad_checkpointing(checkpointing)
    torch.testing.assert_close(features_and_gradients(tower, tower, ids), expected, rtol=1e-9, atol=1e-12)


def operations(function: object, *arguments: object) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*arguments)
    return int(counter.get_total_flops())


def test_the_last_block_multiplies_one_token_beyond_keys_and_values() -> None:
    """A token of a block takes 24 width^2 operations, of which 6 width^2 are for queries, keys and values. In the
    attention, the queries of all other tokens are left out.
    """
    tower, images = image_tower().to("meta"), torch.rand(5, 3, 16, 16, dtype=torch.float64, device="meta")
    tokens = 17
    saved = 5 * (tokens - 1) * (18 * WIDTH**2 + 4 * tokens * WIDTH)
    assert operations(all_patches, tower, images) - operations(tower, images) == saved
    text, ids = text_tower().to("meta"), texts().to("meta")
    saved = len(ids) * (LENGTH - 1) * (18 * WIDTH**2 + 4 * LENGTH * WIDTH)
    assert operations(all_tokens, text, ids) - operations(text, ids) == saved
