"""CLIP's tokenizer compared with open_clip's, id by id."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch

from support import needs

needs("models")

from open_clip.tokenizer import SimpleTokenizer

from fastclip.models.tokenizers.clip import ClipTokenizer
from fastclip.system import installed

TEXTS = {
    "ascii": "a photo of a cat",
    "empty": "",
    "blank": " \t\n ",
    "uppercase": "A Photo Of A CAT, HTML and NASA",
    "digits": "in 1999, 3.14159 and 007 of 1/2",
    "contractions": "it's we're I'VE can't I'm they'll he'd o'clock 'sandals",
    "long s contraction": "it'\u017f",  # matches 's regardless of case, and is unchanged by lower-casing
    "underscores": "_snake_case__name_ and __init__",
    "punctuation": "wait... what?! (really) -- #1 @home $5 50% a&b",
    "accents": "naïve café, Ångström, İstanbul, straße, garçon",
    "combining": "cafe\u0301 a\u0308\u0323 \u0345 x\u0345y",
    "mojibake": "the dogâ€™s cafÃ©",
    "curly quotes and ligatures": "\u201cquoted\u201d \u2018single\u2019 \ufb01ne \ufb02ow",
    "emoji": "I \U0001f496 my \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd",
    "cjk": "一张猫的照片 猫の写真 고양이 사진",
    "right to left": "صورة قطة תמונה של חתול",
    # unassigned in older versions of Unicode, which treat them as symbols
    "newer letters": "\u1e9e \U0001e900 \ua7d0 \U00011f04 \u0c5d\u0cdd",
    "entities": "&lt;b&gt;black &amp;amp; white&lt;/b&gt; &#39;s &eacute; &nbsp;",
    "entities escaped twice": "<b> &amp;amp; &amp;eacute; </b>",  # ftfy does not unescape entities beside tags
    "control characters": "null\x00 bell\x07 \u200bzero\u200dwidth\ufeff",
    "special tokens": "<start_of_text> a <END_OF_TEXT>b!<end_of_text>!!<start_of_text>",
    "repeats": "a" * 300,
    "long text": "a photo of a very small cat on a large mat, " * 20,
    "long word": "antidisestablishmentarianism" * 40,
    "exactly full": "cat " * 75,
    "one too many": "cat " * 76,
}


@pytest.fixture(scope="module")
def ours() -> ClipTokenizer:
    return ClipTokenizer()


@pytest.fixture(scope="module")
def theirs() -> SimpleTokenizer:
    return SimpleTokenizer()


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_tokenizer_equals_open_clip(ours: ClipTokenizer, theirs: SimpleTokenizer, text: str) -> None:
    ids = ours(text)
    assert ids.shape == (1, 77) and ids.dtype == torch.int64
    assert ids.tolist() == theirs(text).tolist()


RANGES = [(32, 127), (32, 0x250), (0, 0x3000), (0x300, 0x370), (0x1F300, 0x1FA00), (0, 0xD800), (0xE000, 0x110000)]
WORDS = [
    "a",
    "photo",
    "of",
    "the",
    "2 dogs",
    "it's",
    "&amp;",
    "cafÃ©",
    "#sunset",
    "http://x.org/1.jpg",
    "<b>",
    "...",
    "NEW",
]


@pytest.mark.parametrize("thousands", [10, pytest.param(100, marks=pytest.mark.full)])
def test_tokenizer_equals_open_clip_on_random_texts(
    ours: ClipTokenizer, theirs: SimpleTokenizer, thousands: int
) -> None:
    """The tokenizer equals open_clip's on random texts: two thirds are captions made of common words of the web, the
    others mix ASCII with characters of one script.
    """
    draw = random.Random(0)
    for _ in range(thousands):
        texts = []
        for i in range(1000):
            if i % 3:
                words = [draw.choice(WORDS) for _ in range(draw.randrange(1, 9))]
                words.insert(0, "".join(chr(draw.randrange(97, 123)) for _ in range(draw.randrange(1, 9))))
                texts.append(draw.choice([" ", "  ", ", ", "-"]).join(words))
            else:
                bounds = [RANGES[i % len(RANGES)], (32, 127)]
                texts.append("".join(chr(draw.randrange(*draw.choice(bounds))) for _ in range(draw.randrange(1, 40))))
        wrong = [text for text, a, b in zip(texts, ours(texts).tolist(), theirs(texts).tolist(), strict=True) if a != b]
        assert not wrong, f"{len(wrong)} of {len(texts)} differ, the first is {wrong[0]!r}"


def test_tokenizer_starts_ends_and_pads(ours: ClipTokenizer) -> None:
    short, long = ours(["a cat", "cat " * 500]).tolist()
    assert short == [49406, 320, 2368, 49407] + [0] * 73
    assert long == [49406] + [2368] * 75 + [49407]
    assert (ours.vocab_size, ours.start_id, ours.end_id) == (49408, 49406, 49407)
    assert ours([]).shape == (0, 77)


def test_tokenizer_context_length(theirs: SimpleTokenizer) -> None:
    texts = ["a", "one two three four five six seven eight"]
    assert ClipTokenizer(context_length=6)(texts).tolist() == theirs(texts, context_length=6).tolist()
    with pytest.raises(ValueError, match="context_length"):
        ClipTokenizer(context_length=1)


def test_tokenizer_does_not_import_open_clip() -> None:
    code = (
        "import sys; from fastclip.models.tokenizers.clip import ClipTokenizer; ClipTokenizer()('a'); "
        "sys.exit('open_clip was imported' if 'open_clip' in sys.modules else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_tokenizer_without_open_clip_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install open_clip_torch"):
        ClipTokenizer()
