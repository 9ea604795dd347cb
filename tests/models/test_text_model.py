"""CLIP's text tower compared with open_clip's on the same weights, and the model that joins both towers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support import needs

needs("models")

from open_clip.transformer import QuickGELU as OpenClipQuickGELU
from open_clip.transformer import TextTransformer as OpenClipTextTransformer

import fastclip
from fastclip.evaluation.validate import _text_features
from fastclip.models.dual_encoder import DualEncoder
from fastclip.models.embedder import Embedder
from fastclip.models.towers.text import TextTransformer

WIDTH, LAYERS, HEADS, OUTPUT_DIM, CONTEXT_LENGTH, VOCAB_SIZE = 48, 3, 4, 40, 20, 97
END = VOCAB_SIZE - 1


def small_tower(*, quick_gelu: bool = False) -> TextTransformer:
    return TextTransformer(
        width=WIDTH,
        layers=LAYERS,
        heads=HEADS,
        output_dim=OUTPUT_DIM,
        context_length=CONTEXT_LENGTH,
        vocab_size=VOCAB_SIZE,
        quick_gelu=quick_gelu,
    )


def random_ids(count: int) -> Tensor:
    """Return texts of every length: random tokens, the end token, zeros."""
    ids = torch.randint(1, END, (count, CONTEXT_LENGTH))
    for row, text in enumerate(ids):
        end = row % CONTEXT_LENGTH
        text[end], text[end + 1 :] = END, 0
    return ids


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_text_equals_open_clip_on_its_weights(quick_gelu: bool) -> None:
    torch.manual_seed(0)
    theirs = OpenClipTextTransformer(
        context_length=CONTEXT_LENGTH,
        vocab_size=VOCAB_SIZE,
        width=WIDTH,
        heads=HEADS,
        layers=LAYERS,
        output_dim=OUTPUT_DIM,
        act_layer=OpenClipQuickGELU if quick_gelu else nn.GELU,
    )
    with torch.no_grad():
        for parameter in theirs.parameters():  # as after training: no bias is 0, no LayerNorm gain is 1
            parameter.add_(0.2 * torch.randn_like(parameter))
    ours = small_tower(quick_gelu=quick_gelu)
    ours.load_state_dict(theirs.state_dict())  # strict: every name and shape must agree
    ids = random_ids(40)
    expected, found = theirs(ids), ours(ids)
    assert found.shape == (40, OUTPUT_DIM)
    assert relative_error(found, expected) < 1e-5

    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    gradients = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        found_grad, expected_grad = gradients[name].grad, parameter.grad
        assert found_grad is not None and expected_grad is not None
        assert relative_error(found_grad, expected_grad) < 1e-4, name


def test_text_sees_what_precedes_the_end_only() -> None:
    torch.manual_seed(0)
    tower = small_tower().eval()
    ids = random_ids(1).repeat(3, 1)
    ids[:, :6] = torch.tensor([5, 6, 7, 8, 9, END])
    ids[1, 6:] = 11  # padding other than zero
    ids[2, 0] = 12  # another first token
    features = tower(ids)
    torch.testing.assert_close(features[0], features[1])
    assert not torch.allclose(features[0], features[2], atol=1e-4)
    torch.testing.assert_close(tower(ids[:, :6]), features)


def test_texts_are_embedded_without_their_common_padding() -> None:
    torch.manual_seed(0)
    model, tokenize = fastclip.create_model("ViT-tiny"), fastclip.get_tokenizer("ViT-tiny")
    texts = ["a cat", "a photo of two dogs", "", "a man on a horse"]  # 4, 7, 2 and 7 tokens
    expected = F.normalize(model.encode_text(tokenize(texts)), dim=1)
    widths = []
    model.text.register_forward_pre_hook(lambda tower, arguments: widths.append(arguments[0].shape[1]))
    embedder = Embedder(model, tokenize, precision="fp32", name="ViT-tiny")
    torch.testing.assert_close(embedder.embed_texts(texts), expected)
    torch.testing.assert_close(embedder.embed_texts(texts, batch_size=1), expected)
    with torch.no_grad():
        torch.testing.assert_close(_text_features(model, tokenize, texts, 3, None), expected)
    assert widths == [7, 4, 7, 2, 7, 7, 7]
    assert embedder.embed_texts([]).shape == (0, 64)


def test_text_initialisation_is_that_of_clip() -> None:
    torch.manual_seed(0)
    width, layers = 256, 4
    tower = TextTransformer(width=width, layers=layers, heads=4, output_dim=128, vocab_size=1000)
    added = width**-0.5 * (2 * layers) ** -0.5
    block = "transformer.resblocks.3."
    expected = {
        "token_embedding.weight": 0.02,
        "positional_embedding": 0.01,
        "text_projection": width**-0.5,
        block + "attn.in_proj_weight": width**-0.5,
        block + "attn.out_proj.weight": added,
        block + "mlp.c_fc.weight": (2 * width) ** -0.5,
        block + "mlp.c_proj.weight": added,
        block + "attn.in_proj_bias": 0.0,
        block + "attn.out_proj.bias": 0.0,
    }
    parameters = dict(tower.named_parameters())
    for name, std in expected.items():
        assert float(parameters[name].detach().std()) == pytest.approx(std, rel=0.03), name


def test_text_rejects_a_width_that_the_heads_do_not_share() -> None:
    with pytest.raises(ValueError, match="width=48 and heads=5"):
        TextTransformer(width=48, layers=1, heads=5, output_dim=8)


def test_clip_features_have_unit_length_and_the_scale_is_exponentiated() -> None:
    torch.manual_seed(0)
    model = DualEncoder(nn.Sequential(nn.Flatten(), nn.Linear(12, OUTPUT_DIM)), small_tower())
    images, ids = torch.randn(5, 3, 2, 2), random_ids(7)
    image_features, text_features, scale = model(images, ids)
    assert image_features.shape == (5, OUTPUT_DIM) and text_features.shape == (7, OUTPUT_DIM)
    for features in (image_features, text_features):
        torch.testing.assert_close(features.norm(dim=1), torch.ones(len(features)))
    assert scale.item() == pytest.approx(1 / 0.07)
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    raw = model.encode_image(images)
    torch.testing.assert_close(raw / raw.norm(dim=1, keepdim=True), image_features)
    assert not torch.allclose(raw, image_features)
