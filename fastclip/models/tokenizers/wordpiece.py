"""BERT's tokenizer, through transformers, from a local vocabulary or Hugging Face's cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from fastclip.models.tokenizers.clip import texts_of
from fastclip.models.tokenizers.vocabulary import words_of

__all__ = ["PAD_ID", "BertTokenizer"]

PAD_ID = 0  # [PAD], the first token of every vocabulary here


class BertTokenizer:
    """Texts to WordPiece ids (Devlin et al. 2019): [CLS] words [SEP], then [PAD].

    Args:
        vocabulary: a ``vocab.txt`` or ``tokenizer.json``, a folder of a tokenizer, or a name in Hugging Face's cache
            (``bert-base-uncased``). Nothing is downloaded.
        context_length: tokens a text, at least 2; longer texts are cut, and end in [SEP] all the same.

    Raises:
        FileNotFoundError: neither a file nor in the cache.
        ValueError: no vocabulary of BERT, or a tokenizer that treats texts in another way.
    """

    def __init__(self, vocabulary: str | Path, *, context_length: int) -> None:
        if context_length < 2:
            raise ValueError(f"context_length must hold the start and the end token, got {context_length}")
        self.context_length = context_length
        self._tokenizer = _load(vocabulary)
        if self._tokenizer.pad_token_id != PAD_ID:
            raise ValueError(f"{vocabulary}: [PAD] must be token {PAD_ID}, is {self._tokenizer.pad_token_id}")

    @property
    def vocab_size(self) -> int:
        return len(self._tokenizer)

    @property
    def identity(self) -> str:
        """A digest of vocabulary and length, which differs where texts may have other ids."""
        words = sorted(self._tokenizer.get_vocab().items())
        return hashlib.blake2b(repr((self.context_length, words)).encode(), digest_size=16).hexdigest()

    def __call__(self, texts: str | Iterable[str]) -> Tensor:
        """One text or B of them -> token ids (B, context_length), int64; TypeError for anything else."""
        # half a surrogate pair has no UTF-8, which the tokenizer's Rust code asks for
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
    except Exception as error:  # what transformers' readers meet
        if path.exists():
            message = " ".join(str(error).split())
            raise ValueError(f"{vocabulary} is no vocabulary or tokenizer of BERT: {message}") from error
        raise FileNotFoundError(
            f"BERT's vocabulary {str(vocabulary)!r} is neither a file nor in Hugging Face's cache. Where there is a "
            f"network, `hf download {vocabulary}` fetches it; get_tokenizer(name, vocabulary='path/to/vocab.txt') "
            "reads a file"
        ) from error
