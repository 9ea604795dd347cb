"""CLIP's byte-pair tokenizer, based on the `tokenizers` library.

The vocabulary is package data of open_clip_torch. It is read at run time, without importing that package.
"""

from __future__ import annotations

import gzip
import html
from collections.abc import Iterable, Mapping
from pathlib import Path

import ftfy
import regex
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from fastclip.system.installed import installed_file

__all__ = ["CONTEXT_LENGTH", "ClipTokenizer", "texts_of", "vocabulary_path"]

CONTEXT_LENGTH = 77  # tokens per text in all of CLIP's models, including the start and the end token
START, END = "<start_of_text>", "<end_of_text>"

_VOCABULARY_FILE = "bpe_simple_vocab_16e6.txt.gz"
_VOCABULARY_SIZE = 49408
# Texts are split into words by `regex`, as in CLIP. The expressions built into `tokenizers` follow an older version of
# Unicode, which treats thousands of newer letters as symbols.
_WORD = regex.compile(
    rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+", regex.IGNORECASE
)


def vocabulary_path() -> Path:
    """Return the path of CLIP's merges in the installed package open_clip_torch.

    Raises:
        ImportError: open_clip_torch is not installed.
    """
    return installed_file("open_clip", _VOCABULARY_FILE, what="CLIP's vocabulary", install="open_clip_torch")


class ClipTokenizer:
    """CLIP's tokenizer, equal to ``open_clip.tokenizer.SimpleTokenizer`` (Radford et al. 2021, section 2.4).

    A text is cleaned (mojibake, HTML entities, white space), converted to lower case and split into words. The UTF-8
    bytes of each word are then merged pair by pair. The vocabulary has 49,408 tokens.

    Args:
        context_length: tokens per text, at least 2. Longer texts are truncated, but still end in the end token.

    Raises:
        ImportError: open_clip_torch, which contains the vocabulary, is not installed.
        ValueError: `context_length` is below 2.
    """

    def __init__(self, *, context_length: int = CONTEXT_LENGTH) -> None:
        if context_length < 2:
            raise ValueError(f"context_length must be at least 2 for the start and the end token, got {context_length}")
        self.context_length = context_length
        self._bpe = _build_bpe()
        self.start_id, self.end_id = self._bpe.token_to_id(START), self._bpe.token_to_id(END)
        self._bpe.post_processor = processors.TemplateProcessing(
            single=f"{START} $A {END}", special_tokens=[(START, self.start_id), (END, self.end_id)]
        )
        self._bpe.enable_truncation(context_length)
        self._bpe.enable_padding(length=context_length, pad_id=0)

    @property
    def vocab_size(self) -> int:
        return self._bpe.get_vocab_size()

    def __call__(self, texts: str | Iterable[str]) -> Tensor:
        """Tokenize one text or B texts.

        Returns:
            Token ids (B, context_length), int64: 49406 at the start, 49407 at the end, then zeros.

        Raises:
            TypeError: an element is not a string.
        """
        texts = texts_of(texts)
        words = [_WORD.findall(_clean(text)) for text in texts]
        # the "fast" variant does not compute offsets, which are not needed
        encodings = self._bpe.encode_batch_fast(words, is_pretokenized=True)
        ids = torch.tensor([encoding.ids for encoding in encodings], dtype=torch.int64)
        return ids.reshape(len(texts), self.context_length)


def texts_of(texts: str | Iterable[str]) -> list[str]:
    """Return one text or several as a list.

    Raises:
        TypeError: `texts` is neither a string nor an iterable of strings.
    """
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, bytes | Mapping) or not isinstance(texts, Iterable):
        raise TypeError(f"texts must be a str or an iterable of str, got {type(texts).__name__}")
    several = list(texts)
    for place, text in enumerate(several):
        if not isinstance(text, str):
            raise TypeError(f"texts must be str, got {type(text).__name__} at index {place}")
    return several


def _clean(text: str) -> str:
    text = html.unescape(html.unescape(ftfy.fix_text(text)))  # captions from the web are often escaped twice
    return " ".join(text.split()).lower()


def _build_bpe() -> Tokenizer:
    """Build the tokenizer with CLIP's ids: 256 bytes, 256 bytes that end a word, the merges in order, start and end."""
    lines = gzip.decompress(vocabulary_path().read_bytes()).decode("utf-8").split("\n")
    lines = lines[1 : 1 + _VOCABULARY_SIZE - 2 * 256 - 2]  # line 0 is a header; CLIP does not use the last merges
    merges = [(left, right) for left, right in map(str.split, lines)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *(a + b for a, b in merges), START, END]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.add_special_tokens([AddedToken(token, normalized=False) for token in (START, END)])
    return bpe
