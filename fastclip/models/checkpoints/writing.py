"""Files of a model: written together, and read back as those that were written together."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from fastclip.models.processor import PROCESSOR_FILES
from fastclip.models.tokenizers.vocabulary import VOCABULARY
from fastclip.system.durable import new_files, write_tensors
from fastclip.system.reading import open_tensors

__all__ = [
    "CLASSES",
    "CLASSIFIER_FILES",
    "CONFIG",
    "HEAD",
    "HUGGINGFACE_FILES",
    "OPEN_CLIP_CONFIG",
    "OPEN_CLIP_FILES",
    "OPEN_CLIP_WEIGHTS",
    "OWN_FILES",
    "WEIGHTS",
    "WEIGHTS_READ",
    "check_written_together",
    "new_model",
    "write_weights",
]

logger = logging.getLogger(__name__)
CONFIG, WEIGHTS = "config.json", "model.safetensors"  # of a folder of this package or of Hugging Face
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
WEIGHTS_READ = (  # the first there is
    WEIGHTS,
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    *OPEN_CLIP_WEIGHTS,
)
HEAD, CLASSES = "head.safetensors", "classes.json"  # of a classifier
OPEN_CLIP_FILES = (OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS[0])
OWN_FILES = (CONFIG, WEIGHTS, VOCABULARY)
CLASSIFIER_FILES = (*OWN_FILES, HEAD, CLASSES)
HUGGINGFACE_FILES = (CONFIG, WEIGHTS, PROCESSOR_FILES[1], VOCABULARY)
# What tells a model, or is read before what another form writes
_OF_MODELS = (OPEN_CLIP_CONFIG, CONFIG, *WEIGHTS_READ, HEAD)
_DIGEST = "fastclip.config"  # among the metadata of weights: the BLAKE2b of the configuration beside them


@contextmanager
def new_model(folder: str | Path, files: tuple[str, ...], *, read_first: tuple[str, ...] = ()) -> Iterator[Path]:
    """A folder to write `files`, or some of them, into, which take their places in `folder` when all went well.

    Args:
        read_first: files that are not written, and that would be read in place of some of `files`.

    Raises:
        OSError: they cannot be written; nothing has changed.
        ValueError: `folder` holds files of another model, which would stay beside these.
    """
    folder = Path(folder)
    if others := [name for name in (*_OF_MODELS, *read_first) if name not in files and (folder / name).exists()]:
        raise ValueError(f"{folder} holds {others[0]} of another model: choose a folder without, or remove it")
    with new_files(folder) as half:
        yield half


def write_weights(file: Path, tensors: Mapping[str, Tensor], *, config: Path | None = None) -> None:
    """Write tensors of any device, with a mark of the configuration that they belong to."""
    metadata = {"format": "pt"} | ({} if config is None else {_DIGEST: _digest(config)})
    written: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        # safetensors refuses memory that is shared: a parameter of two names, or parts of one tensor
        if tensor.untyped_storage().data_ptr() in places:
            tensor = tensor.clone()
        places.add(tensor.untyped_storage().data_ptr())
        written[name] = tensor
    write_tensors(file, written, metadata)


def check_written_together(weights: Path, config: Path) -> None:
    """Warn of a configuration that is not the one with which these weights were written."""
    with open_tensors(weights) as opened:
        wanted = (opened.metadata() or {}).get(_DIGEST)
    if wanted is not None and wanted != _digest(config):
        logger.warning("%s was changed after %s was written, or is another model's", config, weights.name)


def _digest(config: Path) -> str:
    return hashlib.blake2b(config.read_bytes(), digest_size=16).hexdigest()
