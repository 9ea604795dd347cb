"""Vocabulary files of BERT: ``vocab.txt``, or the ``tokenizer.json`` that transformers 5 writes in its place."""

from __future__ import annotations

from pathlib import Path
from reprlib import repr as shown
from typing import Any

from fastclip.models.config import BertConfig, ModelConfig, mapping
from fastclip.system.reading import read_json

__all__ = ["TOKENIZER_FILES", "VOCABULARY", "is_file_name", "vocabulary_beside", "vocabulary_in", "words_of"]

VOCABULARY = "vocab.txt"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")  # transformers prefers these to vocab.txt
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# The behaviour of fastclip's tokenizer, in terms of tokenizer.json and tokenizer_config.json. If strip_accents is null,
# accents are stripped as well.
_MODEL = {"continuing_subword_prefix": "##", "unk_token": "[UNK]", "max_input_chars_per_word": 100}
_NORMALISER = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True}
_OPTIONS = {"do_lower_case": True, "tokenize_chinese_chars": True, "strip_accents": True}


def vocabulary_in(folder: Path) -> str:
    """Return the file name of the vocabulary that transformers would read in the folder of an AlignModel.

    For a folder without a vocabulary, the result is the name of BERT's original vocabulary, ``bert-base-uncased``.

    Raises:
        ValueError: the folder's tokenizer processes texts differently from fastclip's. The message names the file.
    """
    tokenizer, options = (folder / name for name in TOKENIZER_FILES)
    if options.is_file():
        _check({name: value for name, value in read_json(options).items() if value is not None}, _OPTIONS, str(options))
    plain = folder / VOCABULARY
    if not tokenizer.is_file():
        return VOCABULARY if plain.is_file() else "bert-base-uncased"
    words = words_of(tokenizer)  # checks the file now rather than only when the model is saved
    same = plain.is_file() and plain.read_text(encoding="utf-8", errors="replace").splitlines() == words
    return VOCABULARY if same else tokenizer.name


def words_of(file: Path) -> list[str]:
    """Return the words of a ``tokenizer.json`` in the order of their ids.

    Raises:
        ValueError: the file is not a WordPiece tokenizer that normalises texts as BERT does, or its ids have gaps. The
            message names the file.
    """
    values = read_json(file)
    model, normaliser, before = (
        mapping(values.get(name) or {}, f"{file}: {name}") for name in ("model", "normalizer", "pre_tokenizer")
    )
    _check({"type": "WordPiece", **model}, {"type": "WordPiece", **_MODEL}, f"{file}: model")  # old files have no type
    _check({"type": None, **normaliser}, _NORMALISER, f"{file}: normalizer")
    if normaliser.get("strip_accents") is False:
        raise ValueError(f"{file}: normalizer: strip_accents must be true or null, got False")
    _check({"type": None, **before}, {"type": "BertPreTokenizer"}, f"{file}: pre_tokenizer")
    added = values.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(t, dict) and t.get("content") in _SPECIAL for t in added):
        raise ValueError(f"{file}: added_tokens may only be {', '.join(_SPECIAL)}; others are not supported")
    ids = mapping(model.get("vocab"), f"{file}: model: vocab")
    if not all(type(number) is int for number in ids.values()) or sorted(ids.values()) != list(range(len(ids))):
        raise ValueError(f"{file}: model: vocab must number its {len(ids)} words from 0 without gaps")
    if missing := [word for word in _SPECIAL[:4] if word not in ids]:
        raise ValueError(f"{file}: model: vocab has no {missing[0]}")
    if odd := [word for word in ids if word.split() != [word]]:
        raise ValueError(
            f"{file}: model: vocab contains {shown(odd[0])}, which cannot be a line of {VOCABULARY}, as it is empty "
            "or has white space"
        )
    return sorted(ids, key=ids.__getitem__)


def _check(values: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    for name, value in wanted.items():
        if name in values and (values[name] != value or type(values[name]) is not type(value)):
            raise ValueError(f"{where}: {name} must be {value!r}, as in BERT's tokenizer, got {shown(values[name])}")


def is_file_name(vocabulary: str) -> bool:
    """Return True if a configuration's vocabulary is a file next to it, not a name in Hugging Face's cache."""
    return vocabulary.endswith((".txt", ".json"))


def vocabulary_beside(config: ModelConfig) -> bytes | None:
    """Return BERT's vocabulary next to a configuration as the contents of a ``vocab.txt``, or None if there is none."""
    if not isinstance(config.text_cfg, BertConfig) or config.folder is None:
        return None
    file = config.folder / config.text_cfg.vocabulary
    if not file.is_file():
        return None
    return "".join(f"{word}\n" for word in words_of(file)).encode() if file.suffix == ".json" else file.read_bytes()
