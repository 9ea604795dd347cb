"""CLIP's byte-pair tokenizer, on the `tokenizers` library.

The vocabulary is package data of open_clip_torch, read at run time and found without importing the package.
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

CONTEXT_LENGTH = 77  # tokens a text, start and end included, of every CLIP model
START, END = "<start_of_text>", "<end_of_text>"

_VOCABULARY_FILE = "bpe_simple_vocab_16e6.txt.gz"
_VOCABULARY_SIZE = 49408
# The split is left to `regex`, as in CLIP: the expressions built into `tokenizers` know an older Unicode, in which
# some thousand newer letters are symbols.
_WORD = regex.compile(
    rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+", regex.IGNORECASE
)


def vocabulary_path() -> Path:
    """Return the path of CLIP's merges inside the installed open_clip_torch; ImportError when it is not installed."""
    return installed_file("open_clip", _VOCABULARY_FILE, what="CLIP's vocabulary", install="open_clip_torch")


class ClipTokenizer:
    """Texts to token ids, equal to ``open_clip.tokenizer.SimpleTokenizer`` (Radford et al. 2021, section 2.4).

    A text is cleaned (mojibake, HTML entities, white space), lowered, split into words, and each word's UTF-8 bytes
    are merged pair by pair; 49,408 tokens.

    Args:
        context_length: tokens a text, at least 2; longer texts are cut, and end in the end token all the same.

    Raises:
        ImportError: open_clip_torch, whose vocabulary this reads, is not installed.
    """

    def __init__(self, *, context_length: int = CONTEXT_LENGTH) -> None:
        if context_length < 2:
            raise ValueError(f"context_length must hold the start and the end token, got {context_length}")
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
        """One text or B of them -> token ids (B, context_length), int64: start 49406, end 49407, then zeros.

        Raises:
            TypeError: something is no text.
        """
        texts = texts_of(texts)
        words = [_WORD.findall(_clean(text)) for text in texts]
        # "fast" leaves offsets out, which nobody asks for
        encodings = self._bpe.encode_batch_fast(words, is_pretokenized=True)
        ids = torch.tensor([encoding.ids for encoding in encodings], dtype=torch.int64)
        return ids.reshape(len(texts), self.context_length)


def texts_of(texts: str | Iterable[str]) -> list[str]:
    """Return a text, or several, as a list; TypeError for anything else."""
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, bytes | Mapping) or not isinstance(texts, Iterable):
        raise TypeError(f"texts must be a str or several, got {type(texts).__name__}")
    several = list(texts)
    for place, text in enumerate(several):
        if not isinstance(text, str):
            raise TypeError(f"texts must be str, got {type(text).__name__} at place {place}")
    return several


def _clean(text: str) -> str:
    text = html.unescape(html.unescape(ftfy.fix_text(text)))  # twice: captions of the web are often escaped twice
    return " ".join(text.split()).lower()


def _build_bpe() -> Tokenizer:
    """Build CLIP's ids: the 256 bytes, those at the end of a word, the merges in order, the start and end token."""
    lines = gzip.decompress(vocabulary_path().read_bytes()).decode("utf-8").split("\n")
    lines = lines[1 : 1 + _VOCABULARY_SIZE - 2 * 256 - 2]  # the first is a header; CLIP leaves the last merges unused
    merges = [(left, right) for left, right in map(str.split, lines)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *(a + b for a, b in merges), START, END]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.add_special_tokens([AddedToken(token, normalized=False) for token in (START, END)])
    return bpe
