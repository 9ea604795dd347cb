"""BERT's tokenizer from transformers, with a local vocabulary or one from Hugging Face's cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from fastclip.models.tokenizers.clip import texts_of
from fastclip.models.tokenizers.vocabulary import words_of

__all__ = ["PAD_ID", "BertTokenizer"]

PAD_ID = 0  # id of [PAD], the first token of every supported vocabulary


class BertTokenizer:
    """BERT's WordPiece tokenizer (Devlin et al. 2019): [CLS], the words, [SEP], then [PAD].

    Args:
        vocabulary: a ``vocab.txt`` or ``tokenizer.json`` file, the folder of a tokenizer, or a name in Hugging Face's
            cache (``bert-base-uncased``). Nothing is downloaded.
        context_length: tokens per text, at least 2. Longer texts are truncated, but still end in [SEP].

    Raises:
        FileNotFoundError: the vocabulary is neither a file nor in the cache.
        ValueError: the file is not a vocabulary of BERT, its tokenizer processes texts differently from BERT's, or
            `context_length` is below 2.
    """

    def __init__(self, vocabulary: str | Path, *, context_length: int) -> None:
        if context_length < 2:
            raise ValueError(f"context_length must be at least 2 for the start and the end token, got {context_length}")
        self.context_length = context_length
        self._tokenizer = _load(vocabulary)
        if self._tokenizer.pad_token_id != PAD_ID:
            raise ValueError(f"{vocabulary}: [PAD] must be token {PAD_ID}, got {self._tokenizer.pad_token_id}")

    @property
    def vocab_size(self) -> int:
        return len(self._tokenizer)

    @property
    def identity(self) -> str:
        """Digest of the vocabulary and the context length; tokenizers with equal digests give equal ids."""
        words = sorted(self._tokenizer.get_vocab().items())
        return hashlib.blake2b(repr((self.context_length, words)).encode(), digest_size=16).hexdigest()

    def __call__(self, texts: str | Iterable[str]) -> Tensor:
        """Tokenize one text or B texts.

        Returns:
            Token ids (B, context_length), int64.

        Raises:
            TypeError: an element is not a string.
        """
        # The tokenizer's Rust code needs UTF-8, which cannot represent a lone surrogate.
        texts = [text.encode("utf-8", "replace").decode() for text in texts_of(texts)]
        if not texts:
            return torch.empty(0, self.context_length, dtype=torch.int64)
        ids = self._tokenizer(texts, padding="max_length", truncation=True, max_length=self.context_length)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)


def _load(vocabulary: str | Path):  # type: ignore[no-untyped-def]  # a transformers tokenizer
    import transformers

    path = Path(vocabulary)
    if path.suffix == ".json" and path.is_file():
        words = {word: number for number, word in enumerate(words_of(path))}
        return transformers.BertTokenizerFast(vocab=words, do_lower_case=True)
    try:
        if path.is_file():
            return transformers.BertTokenizerFast(vocab=str(path), do_lower_case=True)
        return transformers.AutoTokenizer.from_pretrained(
            str(vocabulary), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers' readers raise exceptions of many types
        if path.exists():
            message = " ".join(str(error).split())
            raise ValueError(f"{vocabulary} is not a vocabulary or tokenizer of BERT: {message}") from error
        raise FileNotFoundError(
            f"BERT's vocabulary {str(vocabulary)!r} is neither a file nor in Hugging Face's cache. Download it with "
            f"`hf download {vocabulary}`, or give a file: beside the configuration of the model, with --vocabulary, "
            "or as in get_tokenizer(name, vocabulary='path/to/vocab.txt')"
        ) from error
