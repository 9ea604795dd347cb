"""Reading checkpoints: files and folders of OpenAI, open_clip, Hugging Face and this package. No pickle runs."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip.models.config import ModelConfig, read_json
from fastclip.models.huggingface import config_from_huggingface

__all__ = ["Checkpoint", "read_checkpoint", "read_config"]

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
_INSIDE = ("state_dict", "model_state_dict", "model")  # where training checkpoints keep the weights
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
# Not parameters: facts that OpenAI stores beside them, indices and masks of old versions, BERT's pooler, which ALIGN
# does not use.
_IGNORED = ("input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids")
_POOLER = "text_model.pooler."


class Checkpoint(NamedTuple):
    path: Path
    tensors: dict[str, Tensor]  # under the names of their form
    form: str  # "fastclip", "open_clip" or "huggingface"
    config: ModelConfig | None  # where a configuration lies beside the weights
    quick_gelu: bool | None  # where file or configuration tell the activation


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The weights at `path`, in host memory.

    A file: safetensors, or what ``torch.save`` wrote (tensors, numbers and strings only), or a TorchScript archive, of
    which the parameters alone are taken. A folder: ``config.json`` (ours, Hugging Face's CLIPModel or AlignModel) or
    ``open_clip_config.json`` beside the weights, in one file or in shards.

    Raises:
        FileNotFoundError: there is nothing at `path`, or a folder holds no weights.
        ValueError: a file is damaged, would run code, or holds no image-text model.
    """
    path = Path(path)
    config: ModelConfig | None = None
    quick_gelu: bool | None = None
    if path.is_dir():
        config = read_config(path)
        quick_gelu = None if config is None else config.quick_gelu
        file = next((path / name for name in _WEIGHTS if (path / name).is_file()), None)
        if file is None:
            raise FileNotFoundError(f"the folder {path} holds no weights; looked for {', '.join(_WEIGHTS)}")
    elif path.is_file():
        file = path
    else:
        raise FileNotFoundError(f"the checkpoint {path} does not exist")

    archive = _is_torchscript(file)
    tensors = _read_sharded(file) if file.name.endswith(".index.json") else _read_file(file, archive)
    if archive or "input_resolution" in tensors:
        quick_gelu = True  # OpenAI's
    tensors = {
        name: tensor
        for name, tensor in tensors.items()
        if name.rsplit(".", 1)[-1] not in _IGNORED and not name.startswith(_POOLER)
    }
    form, tensors = _form(tensors, file)
    return Checkpoint(path, tensors, form, config, quick_gelu)


def read_config(folder: Path) -> ModelConfig | None:
    if (path := folder / "open_clip_config.json").is_file():
        values = read_json(path)
        merged = {**values.get("model_cfg", {})}
        preprocess = values.get("preprocess_cfg", {})
        taken = ("mean", "std", "interpolation", "resize_mode")
        merged["preprocess_cfg"] = {name: preprocess[name] for name in taken if name in preprocess}
        return ModelConfig.from_dict(merged, where=str(path), folder=folder)
    if not (path := folder / "config.json").is_file():
        return None
    values = read_json(path)
    kind = values.pop("model_type", None)
    if kind == "fastclip":
        return ModelConfig.from_dict(values, where=str(path), folder=folder)
    return config_from_huggingface(folder, kind)


def _read_sharded(index: Path) -> dict[str, Tensor]:
    shards = sorted(set(read_json(index).get("weight_map", {}).values()))
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        file = index.parent / Path(shard).name  # beside the index, whatever it says
        if not file.is_file():
            raise FileNotFoundError(f"{index} names the shard {shard}, which does not exist")
        tensors |= _read_file(file, archive=False)
    return tensors


def _read_file(file: Path, archive: bool) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is no whole safetensors file: {error}") from error
    if archive:
        module = torch.jit.load(str(file), map_location="cpu")
        return {name: tensor.detach() for name, tensor in module.state_dict().items()}
    try:
        values = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0] if "weights_only" not in str(error) else _refused(str(error))
        raise ValueError(f"{file} was not read: {reason}") from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{file} is damaged or no checkpoint: {error}") from error
    return _unwrap(values, file)


def _refused(message: str) -> str:
    lines = [line.strip() for line in message.splitlines()]
    why = next((line for line in lines if line.startswith("WeightsUnpickler error")), "")
    why = why.removeprefix("WeightsUnpickler error: ")
    return f"it holds more than tensors, and unpickling it could run any code ({why})"


def _is_torchscript(file: Path) -> bool:
    if file.suffix in (".safetensors", ".json") or not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _unwrap(values: Any, file: Path) -> dict[str, Tensor]:
    """The state dict inside what was saved, without the prefixes of wrappers."""
    for name in _INSIDE:
        if isinstance(values, Mapping) and isinstance(values.get(name), Mapping):
            values = values[name]
            break
    if not isinstance(values, Mapping):
        raise ValueError(f"{file} holds no state dict but {type(values).__name__}")
    tensors = {str(name): value for name, value in values.items() if isinstance(value, Tensor)}
    while prefix := next((p for p in _PREFIXES if tensors and all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _form(tensors: dict[str, Tensor], file: Path) -> tuple[str, dict[str, Tensor]]:
    """Whose names these are, and the tensors under the plain ones."""
    if any(name.startswith(("vision_model.", "text_model.")) for name in tensors):
        return "huggingface", tensors
    if any(name.startswith("visual.") for name in tensors):
        if any(name.startswith(("visual.conv1.", "visual.transformer.", "visual.attnpool.")) for name in tensors):
            # open_clip's CustomTextCLIP keeps the text tower under text.
            return "open_clip", {name.removeprefix("text."): tensor for name, tensor in tensors.items()}
        return "fastclip", tensors
    if any(name.startswith(("transformer.", "token_embedding.")) for name in tensors):
        return "open_clip", tensors
    names = ", ".join(list(tensors)[:5]) or "nothing"
    raise ValueError(
        f"{file} is no image-text model of OpenAI, open_clip, Hugging Face or fastclip: it holds {names} ..."
    )
