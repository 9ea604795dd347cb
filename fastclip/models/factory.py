"""Models, tokenizers and transforms by name, path or checkpoint."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fastclip.models.config import BertConfig, ModelConfig
from fastclip.models.dual_encoder import DualEncoder, create_model
from fastclip.models.loading import named_config
from fastclip.models.tokenizer import ClipTokenizer
from fastclip.models.transforms import image_transform
from fastclip.models.vocabulary import is_file_name
from fastclip.models.wordpiece import BertTokenizer

if TYPE_CHECKING:
    from torchvision.transforms import Compose

__all__ = [
    "create_model",
    "create_model_and_transforms",
    "get_tokenizer",
    "load_image_transform",
    "tokenizer_of",
]

_Tokenizer = TypeVar("_Tokenizer", ClipTokenizer, BertTokenizer)

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
    """A model with its transforms for training and for evaluation, as open_clip's; `options` are `create_model`'s."""
    model = create_model(name, pretrained, **options)  # type: ignore[arg-type]
    assert model.config is not None
    return model, image_transform(model.config, train=True), image_transform(model.config)


def get_tokenizer(
    name: str, *, context_length: int | None = None, vocabulary: str | Path | None = None
) -> ClipTokenizer | BertTokenizer:
    """The tokenizer of a model: texts -> ids (B, context_length).

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
    """As `get_tokenizer`, of a configuration that messages call `name`."""
    text = config.text_cfg
    length = text.context_length if context_length is None else context_length
    if not isinstance(text, BertConfig):
        if vocabulary is not None:
            raise ValueError(f"{name} has CLIP's tokenizer, whose vocabulary is fixed")
        return _checked(ClipTokenizer(context_length=length), text.vocab_size, name)
    if vocabulary is None:
        beside = None if config.folder is None else config.folder / text.vocabulary
        if beside is None or not beside.is_file():
            if is_file_name(text.vocabulary):  # a file, which is not looked for in the working directory
                raise FileNotFoundError(f"the vocabulary {beside or text.vocabulary} of {name} does not exist")
            beside = None
        vocabulary = beside or text.vocabulary
    return _checked(BertTokenizer(vocabulary, context_length=length), text.vocab_size, name)


def _checked(tokenizer: _Tokenizer, vocab_size: int, name: str) -> _Tokenizer:
    """A tokenizer whose ids the text tower has."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"the vocabulary has {tokenizer.vocab_size} tokens, {name} has {vocab_size}")
    return tokenizer


def load_image_transform(name: str, train: bool = False) -> Compose:
    """PIL image -> (3, S, S) float32 for the model of this name, or of a folder with a configuration."""
    return image_transform(named_config(name), train=train)
