"""Models, tokenizers and transforms by name, path or checkpoint."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fastclip.models.config import BertConfig, ModelConfig
from fastclip.models.dual_encoder import DualEncoder, create_model
from fastclip.models.loading import named_config
from fastclip.models.tokenizers.clip import ClipTokenizer
from fastclip.models.tokenizers.vocabulary import is_file_name
from fastclip.models.tokenizers.wordpiece import BertTokenizer
from fastclip.models.transforms import image_transform

if TYPE_CHECKING:
    from torchvision.transforms import Compose

__all__ = [
    "create_model",
    "create_model_and_transforms",
    "get_tokenizer",
    "load_image_transform",
    "tokenizer_of",
]

for _package in (
    "timm",
    "torchvision",
    "transformers",
):  # looked for, not loaded: that takes long, and waits for a model
    if find_spec(_package) is None:
        raise ModuleNotFoundError(f"No module named {_package!r}", name=_package)


def create_model_and_transforms(
    name: str | None = None, pretrained: str | Path | None = None, **options: object
) -> tuple[DualEncoder, Compose, Compose]:
    """Return a model, its transform for training, its transform for evaluation; `options` are `create_model`'s."""
    model = create_model(name, pretrained, **options)  # type: ignore[arg-type]
    assert model.config is not None
    return model, image_transform(model.config, train=True), image_transform(model.config)


def get_tokenizer(
    name: str, *, context_length: int | None = None, vocabulary: str | Path | None = None
) -> ClipTokenizer | BertTokenizer:
    """Return the tokenizer of a model: texts -> ids (B, context_length).

    Args:
        name: as `create_model`'s, or a folder with a configuration.
        context_length: tokens a text, in place of the configuration's.
        vocabulary: of BERT: a ``vocab.txt`` or ``tokenizer.json``, a folder, or a name in Hugging Face's cache.

    Raises:
        ImportError: open_clip_torch, which holds CLIP's vocabulary, is not installed.
        FileNotFoundError: BERT's vocabulary is neither a file nor in the cache.
    """
    return tokenizer_of(named_config(name), name, context_length=context_length, vocabulary=vocabulary)


def tokenizer_of(
    config: ModelConfig, name: str, *, context_length: int | None = None, vocabulary: str | Path | None = None
) -> ClipTokenizer | BertTokenizer:
    """Return the tokenizer of a configuration that messages call `name`; otherwise as `get_tokenizer`."""
    text = config.text_cfg
    tokenizer: ClipTokenizer | BertTokenizer
    length = text.context_length if context_length is None else context_length
    if isinstance(text, BertConfig):
        vocabulary = _vocabulary_of(config, text, name) if vocabulary is None else vocabulary
        tokenizer = BertTokenizer(vocabulary, context_length=length)
    elif vocabulary is None:
        tokenizer = ClipTokenizer(context_length=length)
    else:
        raise ValueError(f"{name} has CLIP's tokenizer, whose vocabulary is fixed")
    if tokenizer.vocab_size > text.vocab_size:
        raise ValueError(f"the vocabulary has {tokenizer.vocab_size} tokens, {name} has {text.vocab_size}")
    return tokenizer


def _vocabulary_of(config: ModelConfig, text: BertConfig, name: str) -> str | Path:
    """Return the vocabulary beside a configuration, or the name of one in Hugging Face's cache."""
    file = None if config.folder is None else config.folder / text.vocabulary
    if file is not None and file.is_file():
        return file
    if is_file_name(text.vocabulary):  # which is not looked for in the working directory
        raise FileNotFoundError(f"the vocabulary {file or text.vocabulary} of {name} does not exist")
    return text.vocabulary


def load_image_transform(name: str, train: bool = False) -> Compose:
    """Return the transform PIL image -> (3, S, S) float32 of a model's name, or of a folder with a configuration."""
    return image_transform(named_config(name), train=train)
