"""Checkpoints of a run: whole state dicts in safetensors, whatever the number of processes, and JSON files.

    checkpoints/step-00000400/model.safetensors       parameters and buffers, by name
                              optimizer.safetensors   PARAMETER|STATE, such as visual.head.weight|exp_avg
                              ema.safetensors         with --ema
                              state.json              step, options, the optimiser's groups
                              manifest.json           bytes and SHA-256 of the others, checked when a run goes on

A folder is written under another name first and then renamed (`fastclip.system.durable`). No pickle is written or
read, and no random state: dropout and augmentation are functions of the seed, the step and the sample.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from fastclip.system.durable import (
    check_manifest,
    mend_folders,
    new_folder,
    remove_folder,
    set_aside,
    write_json,
    write_manifest,
)
from fastclip.system.reading import read_json, read_tensors
from fastclip.training.step.moving_average import MovingAverage

__all__ = [
    "Snapshot",
    "check_room",
    "find_checkpoint",
    "latest_checkpoint",
    "load_checkpoint",
    "mend_checkpoints",
    "model_state",
    "read_state",
    "set_aside_after",
    "set_aside_run",
    "take_snapshot",
    "write_snapshot",
]

logger = logging.getLogger(__name__)
_NAMES = 256  # bytes, of a tensor in its file's header
_NAME = re.compile(r"step-(\d{8,})")
_KINDS: dict[str, type] = {
    "step": int,
    "samples": int,
    "ema_updates": int,
    "options": dict,
    "skipped": dict,
    "param_groups": list,
}
_WORDS = {int: "a number, 0 or above", dict: "an object", list: "a list of objects"}


class Snapshot(NamedTuple):
    """What a checkpoint will hold, in memory of its own: training may go on while it is written."""

    step: int  # updates made
    tensors: dict[str, dict[str, Tensor]]  # by file
    state: dict[str, Any]  # state.json

    @property
    def size(self) -> int:
        """Bytes on the disk, with a little for names."""
        tensors = [x for values in self.tensors.values() for x in values.values()]
        return sum(x.numel() * x.element_size() + _NAMES for x in tensors) + len(json.dumps(self.state)) + _NAMES


def take_snapshot(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    about: dict[str, Any],
    ema: MovingAverage | None = None,
    writes: bool = True,
) -> Snapshot | None:
    """Copy what a checkpoint holds; every rank calls this, one of them `writes`, and the others get None.

    Args:
        step: updates made.
        about: what else `read_state` is to return; numbers, strings, lists.
    """
    import torch.distributed.checkpoint.state_dict as sharded  # loads FSDP, half a second's work

    tensors: dict[str, dict[str, Tensor]] = {"model": model_state(model), "optimizer": {}}
    groups = []
    optimizer_state: Any = sharded.get_optimizer_state_dict(model, optimizer, options=_whole())
    if writes:
        for name, state in optimizer_state["state"].items():
            for key, value in state.items():
                tensors["optimizer"][f"{name}|{key}"] = torch.as_tensor(value)
        groups = [
            {name: value.item() if isinstance(value, Tensor) else value for name, value in group.items()}
            for group in optimizer_state["param_groups"]
        ]
    live = _storages(model, optimizer) if writes else set()
    tensors = {file: {name: _apart(x, live) for name, x in values.items()} for file, values in tensors.items()}
    if ema is not None:
        ema.swap()
        tensors["ema"] = {name: _apart(x, live) for name, x in model_state(model).items()}  # before they swap back
        ema.swap()
        about = {**about, "ema_updates": ema.updates}
    return Snapshot(step, tensors, {"step": step, **about, "param_groups": groups}) if writes else None


def write_snapshot(folder: Path, snapshot: Snapshot, *, keep: int | None = None) -> Path:
    """Write ``folder/step-...`` and return it; then, not before, remove all but the `keep` newest.

    Raises:
        OSError: it does not fit on the disk, with the bytes that it needs; what was there before is untouched.
    """
    path = folder / f"step-{snapshot.step:08d}"
    try:
        with new_folder(path) as half:
            if _free_bytes(half) < snapshot.size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for name, values in snapshot.tensors.items():
                save_file(values, half / f"{name}.safetensors")
            write_json(half / "state.json", snapshot.state, indent=1)
            write_manifest(half)  # last: it holds the digests of the others
    except (OSError, SafetensorError) as error:
        raise OSError(_what_failed(path, snapshot, error)) from error
    if keep is not None:
        for older in _by_step(folder)[:-keep]:
            remove_folder(older)
    return path


def check_room(folder: Path, model: nn.Module, *, ema: bool = False) -> None:
    """Check before a run begins that `folder` may hold checkpoints, and that one of `model` fits on its disk.

    Raises:
        OSError: it does not, with the bytes, or ``folder`` is a file.
    """
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file, where the checkpoints' folder must be")
    need = 0
    for p in model.parameters():
        copies = 1 + (1 if ema else 0) + (2 if p.requires_grad else 0)  # both optimisers keep two numbers for each
        need += p.numel() * p.element_size() * copies
    if (free := _free_bytes(folder.parent)) < need:
        sizes = f"a checkpoint needs at least {need:,} bytes, and its disk has {free:,} free"
        raise OSError(f"{folder.parent} is too small for this run: {sizes}")


def _free_bytes(folder: Path) -> float:
    disk = shutil.disk_usage(folder)
    return disk.free if disk.total > 0 else math.inf  # some network file systems say 0 of 0


def _what_failed(path: Path, snapshot: Snapshot, error: Exception) -> str:
    message = f"the checkpoint {path} was not written: {getattr(error, 'strerror', None) or error}. "
    message += f"It needs {snapshot.size:,} bytes"
    with suppress(OSError):
        message += f", and its disk has {shutil.disk_usage(path.parent).free:,} free"
    with suppress(ImportError):  # Windows
        import resource

        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if limit != resource.RLIM_INFINITY:
            message += f"; no file may have more than {limit:,} (ulimit -f)"
    older = [other for other in _by_step(path.parent) if other != path]
    return message + (f"; {older[-1].name} stands" if older else "; there was none before")


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, ema: MovingAverage | None = None
) -> int:
    """Fill model, optimiser and average, on every rank; returns the updates made.

    Raises:
        ValueError: the checkpoint is of another model or optimiser, with the first names that differ.
    """
    import torch.distributed.checkpoint.state_dict as sharded

    if ema is not None and not (path / "ema.safetensors").is_file():
        raise ValueError(f"{path} holds no moving average: it was written without --ema")
    state = read_state(path, "param_groups", *(["ema_updates"] if ema is not None else []))
    if ema is not None:
        _set_model_state(model, path / "ema.safetensors")  # by way of the model, which knows its shards
        ema.swap()
        ema.updates = state["ema_updates"]
    _set_model_state(model, path / "model.safetensors")
    values: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(path / "optimizer.safetensors").items():
        parameter, _, key = name.rpartition("|")
        values.setdefault(parameter, {})[key] = tensor
    whole = {"state": values, "param_groups": state["param_groups"]}
    asked = [{name: group[name] for name in ("weight_decay", "betas", "eps")} for group in optimizer.param_groups]
    try:
        sharded.set_optimizer_state_dict(
            model, optimizer, whole, options=sharded.StateDictOptions(full_state_dict=True)
        )
    except (KeyError, RuntimeError, AssertionError, TypeError, AttributeError) as error:  # torch raises any of these
        raise ValueError(f"{path} was written with another optimiser, or other frozen parameters: {error}") from error
    for group, options in zip(optimizer.param_groups, asked):  # of this run, should they have changed
        group.update(options)
    return int(state["step"])


def read_state(path: Path, *needed: str) -> dict[str, Any]:
    """Return the step of a checkpoint, and what else `take_snapshot` was given about the run.

    Raises:
        ValueError: it holds no value of a name that is `needed`, or one of another kind than is written.
    """
    file = path / "state.json"
    try:
        state: dict[str, Any] = read_json(file)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is not a checkpoint: it holds no state.json") from error
    for name in ("step", *needed):
        kind, value = _KINDS[name], state.get(name)
        whole = isinstance(value, kind) and not (isinstance(value, int) and value < 0)
        if not whole or (isinstance(value, list) and not all(isinstance(one, dict) for one in value)):
            raise ValueError(f"{file} is damaged: its {name!r} must be {_WORDS[kind]}, and is {value!s:.40}")
    return state


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the last checkpoint of a folder whose manifest holds; a warning names each that is passed over.

    Raises:
        ValueError: there are some, and all are damaged.
    """
    problems = []
    for path in reversed(_by_step(folder)):
        try:
            check_manifest(path)
        except ValueError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            logger.warning("%s: the checkpoint before it is used, %s", problem, path.name)
        return path
    if problems:
        raise ValueError(f"{folder} holds no checkpoint that is whole: {'; '.join(problems)}")
    return None


def find_checkpoint(resume: str, output: Path) -> Path | None:
    """Return the checkpoint that ``--resume`` names, its files read and checked, or None for a new run.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is damaged, with the file; of a run the newest that is whole is taken, if there is one.
    """
    if resume == "auto":
        return latest_checkpoint(output / "checkpoints")
    path = Path(resume)
    if not path.is_dir():
        raise FileNotFoundError(f"--resume {resume}: there is no such folder")
    if (path / "state.json").is_file() or _NAME.fullmatch(path.name):
        check_manifest(path)
        return path
    checkpoint = latest_checkpoint(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    if checkpoint is None:
        raise FileNotFoundError(f"--resume {resume} holds no checkpoint, nor does its folder checkpoints")
    return checkpoint


def set_aside_after(folder: Path, step: int) -> None:
    """Rename checkpoints of later steps to ``aside-step-...``, before a run goes on after `step`.

    They are damaged, or of steps that are about to be made anew.
    """
    for path in _by_step(folder):
        if _step(path) > step:
            name = set_aside(path).name
            logger.warning("%s is after step %d, at which this run begins: it is called %s now", path, step, name)


def set_aside_run(folder: Path) -> None:
    """Rename what a run has left in `folder` to ``aside-...``, before one goes on there from a checkpoint of another.

    Else its metrics and the new ones would be mixed, and `find_checkpoint` might take one of its checkpoints.
    """
    left = [path for name in ("metrics.jsonl", "tensorboard", "wandb-id") if (path := folder / name).exists()]
    for path in (*left, *_by_step(folder / "checkpoints")):
        logger.warning(
            "%s is of another run than the one that goes on: it is called %s now", path, set_aside(path).name
        )


def mend_checkpoints(folder: Path) -> None:
    """Remove what a process left that died while it wrote one of the checkpoints in `folder`."""
    mend_folders(folder, "step-*")


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _by_step(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)), key=_step)


def _storages(model: nn.Module, optimizer: torch.optim.Optimizer) -> set[int]:
    """Return the addresses of all storages that training changes in place."""
    from torch.distributed.tensor import DTensor

    states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    tensors = [*model.parameters(), *model.buffers(), *states]
    locals_ = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
    return {x.untyped_storage().data_ptr() for x in locals_}


def _apart(x: Tensor, live: set[int]) -> Tensor:
    """Return `x` in memory that training does not change."""
    x = x.detach().contiguous()
    return x.clone() if x.untyped_storage().data_ptr() in live else x


def _whole() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True)


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, whole, on the host; on a CPU the model's own. Every rank calls this."""
    import torch.distributed.checkpoint.state_dict as sharded

    state: Any = sharded.get_model_state_dict(model, options=_whole())  # annotated for nested ones as well
    return state


def _set_model_state(model: nn.Module, file: Path) -> None:
    import torch.distributed.checkpoint.state_dict as sharded

    tensors: Any = read_tensors(file)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wrong = sorted(expected.keys() ^ tensors.keys()) or [n for n, x in tensors.items() if x.shape != expected[n]]
    if wrong:
        raise ValueError(
            f"{file} is of another model: {', '.join(wrong[:5])} {'differs' if len(wrong) == 1 else 'differ'}"
        )
    sharded.set_model_state_dict(model, tensors, options=sharded.StateDictOptions(full_state_dict=True))
