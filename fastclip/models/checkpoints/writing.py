"""Write the files of a model together, and check when reading that they were written together."""

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
CONFIG, WEIGHTS = "config.json", "model.safetensors"  # in folders of this package and of Hugging Face
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
WEIGHTS_READ = (  # the first file that exists is read
    WEIGHTS,
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    *OPEN_CLIP_WEIGHTS,
)
HEAD, CLASSES = "head.safetensors", "classes.json"  # files of a classifier
OPEN_CLIP_FILES = (OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS[0])
OWN_FILES = (CONFIG, WEIGHTS, VOCABULARY)
CLASSIFIER_FILES = (*OWN_FILES, HEAD, CLASSES)
HUGGINGFACE_FILES = (CONFIG, WEIGHTS, PROCESSOR_FILES[1], VOCABULARY)
# Files whose presence means that a folder contains another model, or that would be read in preference to the files of
# another format
_OF_MODELS = (OPEN_CLIP_CONFIG, CONFIG, *WEIGHTS_READ, HEAD)
_DIGEST = "fastclip.config"  # metadata key of the weights: BLAKE2b digest of the configuration written with them


@contextmanager
def new_model(folder: str | Path, files: tuple[str, ...], *, read_first: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield a temporary folder to write `files` into, and move them into `folder` if the block succeeds.

    Args:
        folder: final folder of the model.
        files: names of the files that may be written.
        read_first: names of other files that a reader would load instead of one of `files`. `folder` must not contain
            them.

    Raises:
        OSError: the files cannot be written. `folder` is unchanged.
        ValueError: `folder` contains files of another model, which would remain next to the new ones.
    """
    folder = Path(folder)
    if others := [name for name in (*_OF_MODELS, *read_first) if name not in files and (folder / name).exists()]:
        raise ValueError(f"{folder} contains {others[0]} of another model: choose another folder, or remove that file")
    with new_files(folder) as half:
        yield half


def write_weights(file: Path, tensors: Mapping[str, Tensor], *, config: Path | None = None) -> None:
    """Write tensors of any device to a safetensors file.

    Args:
        file: output path.
        tensors: tensors by name.
        config: configuration file that belongs to the weights. Its digest is stored for `check_written_together`.
    """
    metadata = {"format": "pt"} | ({} if config is None else {_DIGEST: _digest(config)})
    written: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory, such as a parameter with two names or two parts of a tensor
        if tensor.untyped_storage().data_ptr() in places:
            tensor = tensor.clone()
        places.add(tensor.untyped_storage().data_ptr())
        written[name] = tensor
    write_tensors(file, written, metadata)


def check_written_together(weights: Path, config: Path) -> None:
    """Log a warning if the configuration is not the one that the weights were written with."""
    with open_tensors(weights) as opened:
        wanted = (opened.metadata() or {}).get(_DIGEST)
    if wanted is not None and wanted != _digest(config):
        logger.warning("%s was changed after %s was written, or belongs to another model", config, weights.name)


def _digest(config: Path) -> str:
    return hashlib.blake2b(config.read_bytes(), digest_size=16).hexdigest()
