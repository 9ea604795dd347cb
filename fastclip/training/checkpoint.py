"""Checkpoints of a run: whole state dicts in safetensors, whatever the number of processes, and a JSON file.

    checkpoints/step-00000400/model.safetensors       parameters and buffers, by name
                              optimizer.safetensors   PARAMETER|STATE, such as visual.head.weight|exp_avg
                              ema.safetensors         with --ema
                              state.json              step, options, the optimiser's groups

A folder is written under another name first and then renamed. No pickle is written or read.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from fastclip.training.optim import MovingAverage

__all__ = ["find_checkpoint", "latest_checkpoint", "load_checkpoint", "read_state", "save_checkpoint"]

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_NAME = re.compile(r"step-(\d{8,})")


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    about: dict[str, Any],
    ema: MovingAverage | None = None,
    writes: bool = True,
) -> Path:
    """Write ``folder/step-...``; called on every rank, one of which `writes`. Returns its path.

    Args:
        step: updates made.
        about: what else `read_state` is to return; numbers, strings, lists.
    """
    path = folder / f"step-{step:08d}"
    tensors: dict[str, dict[str, Tensor]] = {"model": _model_state(model), "optimizer": {}}
    groups = []
    found: Any = get_optimizer_state_dict(model, optimizer, options=_WHOLE)
    if writes:
        for name, state in found["state"].items():
            for key, value in state.items():
                tensors["optimizer"][f"{name}|{key}"] = torch.as_tensor(value)
        groups = [{k: v.item() if isinstance(v, Tensor) else v for k, v in g.items()} for g in found["param_groups"]]
    if ema is not None:
        ema.swap()
        tensors["ema"] = {name: x.clone() for name, x in _model_state(model).items()}  # else they swap, too
        ema.swap()
        about = {**about, "ema_updates": ema.updates}
    if not writes:
        return path
    half = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    for name, values in tensors.items():
        save_file({k: v.detach().contiguous() for k, v in values.items()}, half / f"{name}.safetensors")
    (half / "state.json").write_text(json.dumps({"step": step, **about, "param_groups": groups}, indent=1) + "\n")
    shutil.rmtree(path, ignore_errors=True)
    half.rename(path)
    return path


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, ema: MovingAverage | None = None
) -> int:
    """Fill model, optimiser and average, on every rank; returns the updates made.

    Raises:
        ValueError: the checkpoint is of another model or optimiser, with the first names that differ.
    """
    state = read_state(path)
    if ema is not None:
        if not (path / "ema.safetensors").is_file():
            raise ValueError(f"{path} holds no moving average: it was written without --ema")
        _set_model_state(model, path / "ema.safetensors")
        ema.swap()
        ema.updates = state["ema_updates"]
    _set_model_state(model, path / "model.safetensors")
    values: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(path / "optimizer.safetensors").items():
        parameter, _, key = name.rpartition("|")
        values.setdefault(parameter, {})[key] = tensor
    whole = {"state": values, "param_groups": state["param_groups"]}
    try:
        set_optimizer_state_dict(model, optimizer, whole, options=StateDictOptions(full_state_dict=True))
    except (KeyError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{path} was written with another optimiser, or other frozen parameters: {error}") from error
    return int(state["step"])


def read_state(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` was told about the run, and the step."""
    try:
        return json.loads((path / "state.json").read_text())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is not a checkpoint: it holds no state.json") from error


def latest_checkpoint(folder: Path) -> Path | None:
    """The one of most steps in a ``checkpoints`` folder."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return max(found, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def find_checkpoint(resume: str, output: Path) -> Path | None:
    """What ``--resume`` means: None is a new run."""
    if resume == "auto":
        return latest_checkpoint(output / "checkpoints")
    path = Path(resume)
    if not path.is_dir():
        raise FileNotFoundError(f"--resume {resume}: there is no such folder")
    if (path / "state.json").is_file():
        return path
    found = latest_checkpoint(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    if found is None:
        raise FileNotFoundError(f"--resume {resume} holds no checkpoint, nor does its folder checkpoints")
    return found


def _model_state(model: nn.Module) -> dict[str, Tensor]:
    found: Any = get_model_state_dict(model, options=_WHOLE)  # annotated for nested ones as well
    return found


def _set_model_state(model: nn.Module, file: Path) -> None:
    tensors: Any = load_file(file)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wrong = sorted(expected.keys() ^ tensors.keys()) or [n for n, x in tensors.items() if x.shape != expected[n]]
    if wrong:
        raise ValueError(f"{file} is of another model: {', '.join(wrong[:5])} differ{'s' * (len(wrong) == 1)}")
    set_model_state_dict(model, tensors, options=StateDictOptions(full_state_dict=True))
