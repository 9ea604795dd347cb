"""Read checkpoints of OpenAI, open_clip, Hugging Face and this package, without running any code that they contain."""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as shown
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip.models.checkpoints.huggingface import config_from_huggingface
from fastclip.models.checkpoints.torchscript import is_torchscript, read_torchscript
from fastclip.models.checkpoints.writing import (
    CONFIG,
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_WEIGHTS,
    WEIGHTS_READ,
    check_written_together,
)
from fastclip.models.config import OPEN_CLIP_PREPROCESS, ModelConfig, mapping
from fastclip.system.reading import read_json, read_tensors

__all__ = ["Checkpoint", "read_checkpoint", "read_config"]

logger = logging.getLogger(__name__)
_INSIDE = ("state_dict", "model_state_dict", "model")  # keys under which training checkpoints store the weights
_PREFIXES = ("module.", "_orig_mod.")  # added to names by DistributedDataParallel and torch.compile
# Tensors that are not parameters: sizes that OpenAI stores with the weights, and indices and masks of old versions.
# BERT's pooler is ignored as well, because ALIGN does not use it.
_IGNORED = ("input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids")
_POOLER = "text_model.pooler."
# torch does not compress, so the entries of a genuine zip file claim about as many bytes as the file has. A file whose
# entries claim more than this factor times the file's size could exhaust the memory when it is unpacked.
_MOST_TIMES = 4


class Checkpoint(NamedTuple):
    """Weights in host memory, with everything that their file or folder states about the model."""

    path: Path
    tensors: dict[str, Tensor]  # under the names of `form`
    form: str  # "fastclip", "open_clip" or "huggingface"
    config: ModelConfig | None  # None if there is no configuration next to the weights
    quick_gelu: bool | None  # None if neither the file nor the configuration states the activation


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint into host memory.

    Args:
        path: a file or a folder. A file is in the safetensors format, or was written by ``torch.save`` (tensors,
            numbers and strings only), or is a TorchScript archive, of which only the parameters are read. A folder
            contains ``config.json`` (of this package, or of Hugging Face's CLIPModel or AlignModel) or
            ``open_clip_config.json``, and the weights in one file or in shards.

    Raises:
        FileNotFoundError: `path` does not exist, or the folder contains no weights.
        ValueError: a file is damaged, would run code, or does not contain an image-text model.
    """
    path = Path(path)
    config: ModelConfig | None = None
    quick_gelu: bool | None = None
    if path.is_dir():
        config = read_config(path)
        quick_gelu = None if config is None else config.quick_gelu
        file = _weights(path)
        config_file = _config_file(path)
        if config_file is not None and file.suffix == ".safetensors":
            check_written_together(file, config_file)
    elif path.is_file():
        file = path
    else:
        advice = ": pass the path of a file or folder. To get one from the Hugging Face Hub, use `hf download`"
        hint = "" if path.suffix or path.parent.name else advice
        raise FileNotFoundError(f"the checkpoint {path} does not exist{hint}")

    archive = file.suffix not in (".safetensors", ".json") and is_torchscript(file)
    tensors = _read_sharded(file) if file.name.endswith(".index.json") else _read_file(file, archive)
    if archive or "input_resolution" in tensors:
        quick_gelu = True  # only OpenAI's checkpoints are TorchScript archives or store input_resolution
    tensors = {
        name: tensor
        for name, tensor in tensors.items()
        if name.rsplit(".", 1)[-1] not in _IGNORED and not name.startswith(_POOLER)
    }
    form, tensors = _form(tensors, file)
    return Checkpoint(path, tensors, form, config, quick_gelu)


def _config_file(folder: Path) -> Path | None:
    """Return the path of the configuration file in a folder; open_clip's takes precedence over ``config.json``."""
    return next((folder / name for name in (OPEN_CLIP_CONFIG, CONFIG) if (folder / name).is_file()), None)


def read_config(folder: Path) -> ModelConfig | None:
    """Read the configuration in a folder, or return None if the folder contains none.

    ``open_clip_config.json`` takes precedence over ``config.json``.

    Raises:
        ValueError: the file is damaged, or this package does not support the model. The message names the file.
    """
    if (path := _config_file(folder)) is None:
        return None
    values = read_json(path)
    if path.name == OPEN_CLIP_CONFIG:
        merged = {**mapping(values.get("model_cfg", {}), f"{path}: model_cfg")}
        preprocess = mapping(values.get("preprocess_cfg", {}), f"{path}: preprocess_cfg")
        merged["preprocess_cfg"] = {name: preprocess[name] for name in OPEN_CLIP_PREPROCESS if name in preprocess}
        config = ModelConfig.from_dict(merged, where=str(path), folder=folder)
        if (mode := preprocess.get("mode")) not in (None, "RGB"):
            raise ValueError(f"{path}: preprocess_cfg: mode must be RGB, got {shown(mode)}")
        return config
    kind = values.pop("model_type", None)
    if kind == "fastclip":
        return ModelConfig.from_dict(values, where=str(path), folder=folder)
    return config_from_huggingface(folder, kind)


def _weights(folder: Path) -> Path:
    """Return the path of the weights in a folder.

    If the folder contains several files of weights, open_clip's are preferred if the folder contains open_clip's
    configuration, and the first name of `WEIGHTS_READ` otherwise; a warning names all of them.

    Raises:
        FileNotFoundError: the folder contains no weights.
    """
    is_open_clip = (folder / OPEN_CLIP_CONFIG).is_file()
    names = dict.fromkeys((*OPEN_CLIP_WEIGHTS, *WEIGHTS_READ)) if is_open_clip else WEIGHTS_READ
    there = [name for name in names if (folder / name).is_file()]
    if not there:
        if (folder / "model").is_dir():
            raise FileNotFoundError(f"{folder} is a training run, whose weights are in {folder / 'model'}")
        raise FileNotFoundError(f"the folder {folder} contains no weights (looked for {', '.join(WEIGHTS_READ)})")
    if len(there) > 1:
        logger.warning("%s contains weights in %s; reading %s", folder, " and ".join(there), there[0])
    return folder / there[0]


def _read_sharded(index: Path) -> dict[str, Tensor]:
    shards = mapping(read_json(index).get("weight_map"), f"{index}: weight_map").values()
    if not all(isinstance(shard, str) for shard in shards):
        raise ValueError(f"{index}: weight_map must contain a file name for each tensor")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(shards)):
        file = index.parent / Path(shard).name  # always in the index's folder: the index must not point elsewhere
        if not file.is_file():
            raise FileNotFoundError(f"{index} names the shard {shard}, which does not exist")
        part = _read_file(file, archive=False)
        if twice := sorted(part.keys() & tensors.keys()):
            raise ValueError(f"{file} contains {twice[0]}, which another shard of {index} contains as well")
        tensors |= part
    return tensors


def _read_file(file: Path, archive: bool) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return read_tensors(file)
    tensors = read_torchscript(file) if archive else _unwrap(_read_pickled(file), file)
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise ValueError(f"{file}: {name} must be a dense tensor on the CPU, got one that is {_kind(tensor)}")
    return tensors


def _kind(tensor: Tensor) -> str:
    if tensor.is_quantized:
        return f"quantised ({tensor.dtype})"
    return "without numbers (meta)" if tensor.device.type == "meta" else str(tensor.layout)


def _read_pickled(file: Path) -> Any:
    """Read a file that ``torch.save`` wrote, with torch's unpickler for weights (tensors, numbers and strings only)."""
    with file.open("rb") as opened:
        head = opened.read(16)
    if head[:2] not in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") and head[257:262] != b"ustar":
        reason = f"it begins with {head!r}" if head else "it is empty"
        raise ValueError(f"{file} is damaged or not a checkpoint: {reason}")
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                claimed, size = sum(info.file_size for info in archive.infolist()), file.stat().st_size
            if claimed > _MOST_TIMES * size:
                raise ValueError(f"its entries claim {claimed:,} bytes, but the file has only {size:,}")
        return torch.load(file, map_location="cpu", weights_only=True)  # refuses a pickle that would run code
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        # The rest of torch's message, after "Please use", advises allowing the function; users must not see that.
        if refusal := re.search(r"^\s*WeightsUnpickler error: (.*?)(\. Please use|$)", str(error), re.MULTILINE):
            reason = (
                f"it contains more than tensors, and unpickling it could run arbitrary code ({refusal[1]}). If you "
                "trust the file, save only its state dict, for example as safetensors, and load that file"
            )
        raise ValueError(f"{file} was not read: {reason}") from error
    except MemoryError:
        raise
    except Exception as error:  # for a damaged file, torch's parsers raise exceptions of many types
        if isinstance(error, OSError) and error.errno is not None:  # a disk error
            raise
        reason = str(error).split("\n")[0].split(". ")[0] or type(error).__name__
        raise ValueError(f"{file} is damaged or not a checkpoint: {reason}") from error


def _unwrap(values: Any, file: Path) -> dict[str, Tensor]:
    """Return the state dict inside an unpickled checkpoint, without the prefixes that wrappers add to names."""
    if isinstance(values, Mapping):
        inside = next((name for name in _INSIDE if isinstance(values.get(name), Mapping)), None)
        others = [str(name) for name, value in values.items() if name != inside and _holds_tensors(value)]
        if inside is not None:
            if others:  # a moving average of the weights, for instance
                logger.warning("%s also contains %s; reading only %s", file, " and ".join(others), inside)
            values = values[inside]
    if not isinstance(values, Mapping):
        raise ValueError(f"{file} must contain a state dict, got {type(values).__name__}")
    tensors = {str(name): value for name, value in values.items() if isinstance(value, Tensor)}
    if not tensors:
        names = ", ".join(map(str, list(values)[:5])) or "nothing"
        raise ValueError(f"{file} contains no weights, only {names}")
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(tensor, Tensor) for tensor in value.values())


def _form(tensors: dict[str, Tensor], file: Path) -> tuple[str, dict[str, Tensor]]:
    """Recognise the format by the names of the tensors.

    Returns:
        "fastclip", "open_clip" or "huggingface", and the tensors under the usual names of that format.

    Raises:
        ValueError: the names belong to no format, or to two text towers.
    """
    if any(name.startswith(("vision_model.", "text_model.")) for name in tensors):
        return "huggingface", tensors
    if any(name.startswith("visual.") for name in tensors):
        if any(name.startswith(("visual.conv1.", "visual.transformer.", "visual.attnpool.")) for name in tensors):
            # open_clip's CustomTextCLIP puts "text." in front of the names of the text tower
            plain = {name.removeprefix("text."): tensor for name, tensor in tensors.items()}
            if len(plain) < len(tensors):
                twice = next(name for name in tensors if f"text.{name}" in tensors)
                raise ValueError(f"{file} contains two text towers: {twice} and text.{twice}")
            return "open_clip", plain
        return "fastclip", tensors
    if any(name.startswith(("transformer.", "token_embedding.")) for name in tensors):
        return "open_clip", tensors
    names = ", ".join(list(tensors)[:5]) or "nothing"
    raise ValueError(
        f"{file} does not contain an image-text model in the format of OpenAI, open_clip, Hugging Face or fastclip: "
        f"it contains {names} ..."
    )
