"""The inputs of the towers: tokenizers by model name, BERT's among them, and image transforms."""

from __future__ import annotations

import re
import string
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from support import needs

needs("train")

import open_clip
import transformers
from open_clip.transform import image_transform as open_clip_transform

import fastclip
from fastclip.data.sources.digits import CLASS_NAMES, TEMPLATES
from fastclip.models.config import FOLDER, load_config
from fastclip.models.embedder import Embedder
from fastclip.models.factory import tokenizer_of

VOCABULARY = FOLDER / "align-tiny.vocab.txt"
ODD_TEXTS = {
    "empty": "",
    "blank": " \n\t",
    "emoji": "\U0001f496\U0001f469\u200d\U0001f469\u200d\U0001f467" * 50,
    "control characters": "".join(map(chr, range(32))) + "\x7f\u200b\ufeff\u202e",
    "lone surrogate": "a \ud800 b",
    "100 kB of one word": "a" * 100_000,
    "100 kB of words": "cat " * 25_000,
    "100 kB of emoji": "\U0001f496" * 25_000,
    "100 kB of entities": "&amp;" * 20_000,
    "special tokens": "[CLS] [SEP] [PAD] <end_of_text> <start_of_text>",
}


@pytest.mark.parametrize("name", ["ViT-B-32", "align-tiny", "florence-tiny"])
@pytest.mark.parametrize("text", ODD_TEXTS.values(), ids=ODD_TEXTS.keys())
def test_no_text_fails(name: str, text: str) -> None:
    tokenize = fastclip.get_tokenizer(name)
    ids = tokenize([text, "a cat"])
    config = load_config(name).text_cfg
    assert ids.shape == (2, config.context_length) and ids.dtype == torch.int64
    assert int(ids.min()) >= 0 and int(ids.max()) < config.vocab_size
    assert torch.equal(ids[1], tokenize("a cat")[0])


def test_wordpiece_is_transformers() -> None:
    ours = fastclip.get_tokenizer("align-tiny")
    theirs = transformers.BertTokenizer(vocab=str(VOCABULARY))
    texts = [template.format(name) for template in TEMPLATES for name in CLASS_NAMES] + ["Zebra, 12 µm!", "x" * 300, ""]
    expected = theirs(texts, padding="max_length", truncation=True, max_length=64)["input_ids"]
    assert ours(texts).tolist() == expected
    cls, sep = theirs.cls_token_id, theirs.sep_token_id
    long = ours("one " * 500)[0].tolist()
    assert long[0] == cls and long[-1] == sep and 0 not in long  # truncated text keeps its end token
    assert ours("")[0].tolist() == [cls, sep] + [0] * 62
    assert ours([]).shape == (0, 64)
    with pytest.raises(ValueError, match="context_length must be at least 2 for the start and the end token, got 1"):
        fastclip.get_tokenizer("align-tiny", context_length=1)


def test_align_tiny_vocabulary_has_our_captions_and_every_letter() -> None:
    tokens = VOCABULARY.read_text(encoding="utf-8").split()
    assert len(tokens) == len(set(tokens)) == load_config("align-tiny").text_cfg.vocab_size
    captions = " ".join(template.format(name) for template in TEMPLATES for name in CLASS_NAMES)
    assert set(re.findall(r"\w+", captions)) <= set(tokens)
    unknown = tokens.index("[UNK]")
    printable = "".join(c for c in string.printable if c.isprintable())
    assert unknown not in fastclip.get_tokenizer("align-tiny", context_length=500)(f"{printable} {printable[:62]}")


def test_bert_vocabulary_from_a_file_or_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name = "align-efficientnet-b7-bert-base"
    with pytest.raises(FileNotFoundError, match=r"'no/such-vocabulary' is neither a file nor in Hugging Face's cache"):
        fastclip.get_tokenizer(name, vocabulary="no/such-vocabulary")
    with pytest.raises(FileNotFoundError, match=r"`hf download .*vocabulary='path/to/vocab\.txt'"):
        fastclip.get_tokenizer(name, vocabulary="no/such-vocabulary")
    ids = fastclip.get_tokenizer(name, vocabulary=VOCABULARY)("a photo")
    assert torch.equal(ids, fastclip.get_tokenizer("align-tiny")("a photo"))
    transformers.BertTokenizer(vocab=str(VOCABULARY)).save_pretrained(tmp_path / "bert")
    assert torch.equal(fastclip.get_tokenizer(name, vocabulary=tmp_path / "bert")("a photo"), ids)
    with pytest.raises(ValueError, match="uses CLIP's tokenizer, whose vocabulary is fixed"):
        fastclip.get_tokenizer("ViT-B-32", vocabulary=VOCABULARY)
    shifted = tmp_path / "vocab.txt"
    shifted.write_text("first\n" + VOCABULARY.read_text())
    with pytest.raises(ValueError, match=r"\[PAD\] must be token 0, got 1"):
        fastclip.get_tokenizer("align-tiny", vocabulary=shifted)
    longer = tmp_path / "longer.txt"
    longer.write_text(VOCABULARY.read_text() + "more\n")
    with pytest.raises(ValueError, match=r"the vocabulary has 178 tokens, but align-tiny has only 177"):
        fastclip.get_tokenizer("align-tiny", vocabulary=longer)


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Image.fromarray(values.numpy()).convert(mode)


@pytest.mark.pairwise
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("size", [(300, 260), (200, 500), (37, 41)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_clip_transforms_are_open_clips(train: bool, size: tuple[int, int], mode: str) -> None:
    for name in ("ViT-B-32", "RN50x4"):
        image, pixels = picture(*size, mode), load_config(name).vision_cfg.image_size
        ours, theirs = fastclip.load_image_transform(name, train=train), open_clip_transform(pixels, is_train=train)
        torch.manual_seed(1)
        found = ours(image)
        torch.manual_seed(1)
        assert torch.equal(found, theirs(image))
        assert found.shape == (3, pixels, pixels) and found.dtype == torch.float32


def test_align_transforms() -> None:
    evaluate, train = (fastclip.load_image_transform("align-efficientnet-b7-bert-base", train=t) for t in (False, True))
    white = Image.new("RGB", (500, 400), "white")
    assert torch.equal(evaluate(white), torch.ones(3, 289, 289)) and torch.equal(train(white), torch.ones(3, 289, 289))
    image = picture(346, 346)
    pixels = torch.tensor(list(image.tobytes()), dtype=torch.float32).view(346, 346, 3).permute(2, 0, 1) / 127.5 - 1
    first = (346 - 289) // 2
    top = round((346 - 289) / 2)
    torch.testing.assert_close(evaluate(image), pixels[:, top : top + 289, top : top + 289], atol=1e-6, rtol=0)
    assert first in (top, top - 1)
    wide = picture(500, 300)  # 346 x 346 for any aspect ratio
    square = evaluate(wide.resize((346, 346), Image.Resampling.BILINEAR))
    torch.testing.assert_close(evaluate(wide), square, atol=1e-6, rtol=0)
    torch.manual_seed(0)
    crops = [train(image) for _ in range(8)]
    windows = {x[0, 0, 0].item() for x in crops}
    assert len(windows) > 4  # the crops differ, and some are mirrored
    rows = {tuple(row.tolist()) for row in pixels[0].unfold(1, 289, 1).reshape(-1, 289)}
    mirrored = [tuple(x[0, 0].flip(0).tolist()) in rows for x in crops]
    assert any(mirrored) and not all(mirrored)


def test_model_with_transforms() -> None:
    torch.manual_seed(0)
    model, train, evaluate = fastclip.create_model_and_transforms("ViT-tiny")
    images = torch.stack([train(picture(40, 50)), evaluate(picture(40, 50))])
    assert images.shape == (2, 3, 32, 32) and model.encode_image(images, normalize=True).shape == (2, 64)
    model, train, evaluate = fastclip.create_model_and_transforms("align-tiny", image_size=64)
    assert evaluate(picture(100, 90)).shape == train(picture(100, 90)).shape == (3, 64, 64)
    assert open_clip.__version__


@pytest.mark.parametrize("name", ["ViT-tiny", "align-tiny"])
@pytest.mark.parametrize("texts", [b"a", [b"a"], None, [None], 5, [["a"]], {"a": 1}, ["a", float("nan")]])
def test_what_is_no_text_is_a_type_error(name: str, texts: Any) -> None:
    with pytest.raises(TypeError, match="texts must be"):
        fastclip.get_tokenizer(name)(texts)


@pytest.mark.parametrize("name", ["ViT-tiny", "align-tiny"])
def test_texts_come_from_anything_that_has_some(name: str) -> None:
    tokenize = fastclip.get_tokenizer(name)
    wanted = tokenize(["a", "cat"])
    for texts in (
        ("a", "cat"),
        (text for text in ("a", "cat")),
        np.array(["a", "cat"]),
        dict.fromkeys(["a", "cat"]).keys(),
    ):
        assert torch.equal(tokenize(texts), wanted)
    assert tokenize([]).shape == (0, wanted.shape[1])


def test_one_text_is_no_list_of_letters(embedder: Embedder) -> None:
    assert torch.equal(embedder.embed_texts("a cat"), embedder.embed_texts(["a cat"]))


def test_tower_without_the_tokenizers_ids_is_refused() -> None:
    config = load_config("ViT-tiny")
    small = replace(config, text_cfg=replace(config.text_cfg, vocab_size=600))
    with pytest.raises(ValueError, match="the vocabulary has 49408 tokens, but x has only 600"):
        tokenizer_of(small, "x")


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", ["I;16", "I", "F"])
def test_more_than_eight_bits_are_scaled_and_not_cut_off(kind: str, train: bool) -> None:
    """Values of more than eight bits are scaled: half of the maximum becomes a middle grey, where Pillow's
    conversion would give white or black.
    """
    half, dtype = {"I;16": (32768, np.uint16), "I": (32768, np.int32), "F": (0.5, np.float32)}[kind]
    pixels = np.full((40, 40), half, dtype)
    pixels[0, 0] = 2 * half - (1 if kind != "F" else 0)
    transform = fastclip.load_image_transform("ViT-tiny", train)
    torch.manual_seed(0)
    found = transform(Image.fromarray(pixels))
    torch.manual_seed(0)
    grey = transform(Image.new("RGB", (40, 40), (128, 128, 128)))
    assert float((found - grey).abs().median()) < 0.02


@pytest.mark.parametrize("name", ["ViT-tiny", "align-tiny"])
@pytest.mark.parametrize("train", [False, True])
def test_pictures_of_any_mode_and_shape(name: str, train: bool) -> None:
    transform = fastclip.load_image_transform(name, train)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV"):
        assert transform(Image.new(mode, (40, 30))).shape == (3, 32, 32)
    for size in ((1, 1), (1, 5000), (5000, 1)):
        assert transform(Image.new("RGB", size)).isfinite().all()
    for size in ((0, 0), (0, 5), (5, 0)):
        with pytest.raises(ValueError, match=f"an image of {size[0]} x {size[1]} pixels is empty"):
            transform(Image.new("RGB", size))
    for other in (np.zeros((40, 40, 3), np.uint8), torch.zeros(3, 40, 40), "x.png"):
        with pytest.raises(TypeError, match="takes a PIL image, got"):
            transform(other)
