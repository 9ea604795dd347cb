"""Create models, tokenizers and image transforms from a name, a path or a checkpoint."""

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
):  # checked without importing: the imports are slow and are deferred until a model is created
    if find_spec(_package) is None:
        raise ModuleNotFoundError(f"No module named {_package!r}", name=_package)


def create_model_and_transforms(
    name: str | None = None, pretrained: str | Path | None = None, **options: object
) -> tuple[DualEncoder, Compose, Compose]:
    """Create a model together with its two image transforms.

    Args:
        name: model name, as in `create_model`.
        pretrained: path of a checkpoint, as in `create_model`.
        **options: further options of `create_model`, such as ``device`` or ``image_size``.

    Returns:
        The model in training mode, the transform for training, and the transform for evaluation. Both transforms turn
        a PIL image into a float32 tensor (3, S, S).

    Raises:
        ValueError, FileNotFoundError: under the same conditions as `create_model`.
    """
    model = create_model(name, pretrained, **options)  # type: ignore[arg-type]
    assert model.config is not None
    return model, image_transform(model.config, train=True), image_transform(model.config)


def get_tokenizer(
    name: str, *, context_length: int | None = None, vocabulary: str | Path | None = None
) -> ClipTokenizer | BertTokenizer:
    """Return the tokenizer of a model, a callable that turns B texts into token ids (B, context_length).

    Args:
        name: model name from `list_models`, path of a configuration ending in ``.json``, or folder that contains a
            configuration.
        context_length: tokens per text (default: the configuration's).
        vocabulary: vocabulary of a BERT model: a ``vocab.txt`` or ``tokenizer.json`` file, a folder, or a name in
            Hugging Face's cache (default: the one that the configuration names). CLIP's vocabulary is fixed.

    Raises:
        ImportError: open_clip_torch, which contains CLIP's vocabulary, is not installed.
        FileNotFoundError: BERT's vocabulary is neither a file nor in the cache.
        ValueError: the name is unknown, the vocabulary does not fit the model, or `vocabulary` is given for CLIP's
            tokenizer.
    """
    return tokenizer_of(named_config(name), name, context_length=context_length, vocabulary=vocabulary)


def tokenizer_of(
    config: ModelConfig, name: str, *, context_length: int | None = None, vocabulary: str | Path | None = None
) -> ClipTokenizer | BertTokenizer:
    """Return the tokenizer of a configuration; `name` identifies the model in error messages.

    The other arguments and the errors are those of `get_tokenizer`.
    """
    text = config.text_cfg
    tokenizer: ClipTokenizer | BertTokenizer
    length = text.context_length if context_length is None else context_length
    if isinstance(text, BertConfig):
        vocabulary = _vocabulary_of(config, text, name) if vocabulary is None else vocabulary
        tokenizer = BertTokenizer(vocabulary, context_length=length)
    elif vocabulary is None:
        tokenizer = ClipTokenizer(context_length=length)
    else:
        raise ValueError(
            f"{name} uses CLIP's tokenizer, whose vocabulary is fixed: leave out --vocabulary (in Python, vocabulary=)"
        )
    if tokenizer.vocab_size > text.vocab_size:
        raise ValueError(f"the vocabulary has {tokenizer.vocab_size} tokens, but {name} has only {text.vocab_size}")
    return tokenizer


def _vocabulary_of(config: ModelConfig, text: BertConfig, name: str) -> str | Path:
    """Return the path of the vocabulary next to a configuration, or the name of one in Hugging Face's cache."""
    file = None if config.folder is None else config.folder / text.vocabulary
    if file is not None and file.is_file():
        return file
    if is_file_name(text.vocabulary):  # never searched for in the working directory
        raise FileNotFoundError(f"the vocabulary {file or text.vocabulary} of {name} does not exist")
    return text.vocabulary


def load_image_transform(name: str, train: bool = False) -> Compose:
    """Return the image transform of a model, without creating the model.

    Args:
        name: model name, path of a configuration, or folder that contains a configuration, as in `get_tokenizer`.
        train: return the transform for training, which crops at random, instead of the one for evaluation.

    Returns:
        A transform from a PIL image of any mode to a float32 tensor (3, S, S).
    """
    return image_transform(named_config(name), train=train)
