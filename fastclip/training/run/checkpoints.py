"""Checkpoints of a run: unsharded state dicts in safetensors files, and JSON files.

    checkpoints/step-00000400/model.safetensors       parameters and buffers, by name
                              optimizer.safetensors   PARAMETER|STATE, such as visual.head.weight|exp_avg
                              ema.safetensors         with --ema
                              loss.safetensors        with --loss global (`loss_state`)
                              state.json              step, options, parameter groups of the optimiser
                              manifest.json           size and SHA-256 of the other files, checked when a run resumes

The state dicts do not depend on the number of processes. A folder is first written under a temporary name and then
renamed (`fastclip.system.durable`). No pickle is written or read. No random state is stored, because dropout and
augmentation are functions of the seed, the step and the sample.
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
_NAMES = 256  # bytes per tensor for its entry in the header of a safetensors file
_NAME = re.compile(r"step-(\d{8,})")
_KINDS: dict[str, type] = {
    "step": int,
    "samples": int,
    "ema_updates": int,
    "options": dict,
    "skipped": dict,
    "param_groups": list,
}
_WORDS = {int: "a number of at least 0", dict: "an object", list: "a list of objects"}


class Snapshot(NamedTuple):
    """Copy of the contents of a checkpoint, which training does not change while the checkpoint is written."""

    step: int  # updates made
    tensors: dict[str, dict[str, Tensor]]  # name of the file -> name of the tensor -> tensor
    state: dict[str, Any]  # contents of state.json

    @property
    def size(self) -> int:
        """Size of the checkpoint on disk, in bytes, including an allowance for the headers."""
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
    """Return a copy of everything that a checkpoint holds, or None on ranks that do not write.

    Every rank must call this function, because the shards of FSDP are gathered.

    Args:
        step: updates made.
        about: further values for state.json, which `read_state` returns.
        ema: moving average to store.
        writes: this rank writes the checkpoint. Exactly one rank does.
    """
    import torch.distributed.checkpoint.state_dict as sharded  # loads FSDP, which takes half a second

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
        ema.swap()  # until the second swap, the model holds the averages
        tensors["ema"] = {name: _apart(x, live) for name, x in model_state(model).items()}
        ema.swap()
        about = {**about, "ema_updates": ema.updates}
    return Snapshot(step, tensors, {"step": step, **about, "param_groups": groups}) if writes else None


def write_snapshot(folder: Path, snapshot: Snapshot, *, keep: int | None = None) -> Path:
    """Write a snapshot to ``folder/step-...`` and return that path.

    Args:
        keep: number of the newest checkpoints to keep. Older ones are removed, but only after this one is complete.

    Raises:
        OSError: the checkpoint could not be written, for example because it does not fit on the disk. The message has
            its size in bytes. Earlier checkpoints are untouched.
    """
    path = folder / f"step-{snapshot.step:08d}"
    try:
        with new_folder(path) as half:
            if _free_bytes(half) < snapshot.size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for name, values in snapshot.tensors.items():
                save_file(values, half / f"{name}.safetensors")
            write_json(half / "state.json", snapshot.state, indent=1)
            write_manifest(half)  # last, because it holds the digests of the other files
    except (OSError, SafetensorError) as error:
        raise OSError(_what_failed(path, snapshot, error)) from error
    if keep is not None:
        for older in _by_step(folder)[:-keep]:
            remove_folder(older)
    return path


def check_room(folder: Path, model: nn.Module, *, ema: bool = False) -> None:
    """Check, before a run begins, that `folder` can hold a checkpoint of `model`.

    Raises:
        OSError: the disk has too little space, with both sizes in bytes.
        NotADirectoryError: `folder` is a file. This is a subclass of OSError.
    """
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file, but must be a folder for checkpoints")
    need = 0
    for p in model.parameters():
        copies = 1 + (1 if ema else 0) + (2 if p.requires_grad else 0)  # both optimisers keep two states for each
        need += p.numel() * p.element_size() * copies
    if (free := _free_bytes(folder.parent)) < need:
        sizes = f"a checkpoint needs at least {need:,} bytes, but {free:,} bytes are free"
        raise OSError(f"the disk of {folder.parent} has too little space: {sizes}. Choose another --output")


def _free_bytes(folder: Path) -> float:
    disk = shutil.disk_usage(folder)
    return disk.free if disk.total > 0 else math.inf  # some network file systems report 0 of 0 bytes


def _what_failed(path: Path, snapshot: Snapshot, error: Exception) -> str:
    message = f"the checkpoint {path} was not written: {getattr(error, 'strerror', None) or error}. "
    message += f"It needs {snapshot.size:,} bytes"
    with suppress(OSError):
        message += f", and the disk has {shutil.disk_usage(path.parent).free:,} bytes free"
    with suppress(ImportError):  # Windows
        import resource

        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if limit != resource.RLIM_INFINITY:
            message += f"; a file may have at most {limit:,} (ulimit -f)"
    older = [other for other in _by_step(path.parent) if other != path]
    return message + (f". {older[-1].name} is intact" if older else ". There is no earlier checkpoint")


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, ema: MovingAverage | None = None
) -> int:
    """Load a checkpoint into the model, the optimiser and the moving average, and return the number of updates made.

    Every rank must call this function. Learning rates come from the checkpoint, but weight decay, betas and eps stay
    those of `optimizer`, so that options changed on resume take effect. Whether it processes tensors together
    stays, too, because that depends on the device.

    Raises:
        ValueError: the checkpoint belongs to another model or optimiser. The message has the first names that differ.
    """
    import torch.distributed.checkpoint.state_dict as sharded

    if ema is not None and not (path / "ema.safetensors").is_file():
        raise ValueError(
            f"{path} has no moving average, because it was written without --ema: leave out --ema, or start a new run"
        )
    state = read_state(path, "param_groups", *(["ema_updates"] if ema is not None else []))
    if ema is not None:
        _set_model_state(model, path / "ema.safetensors")  # through the model, which knows how it is sharded
        ema.swap()
        ema.updates = state["ema_updates"]
    _set_model_state(model, path / "model.safetensors")
    values: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(path / "optimizer.safetensors").items():
        parameter, _, key = name.rpartition("|")
        values.setdefault(parameter, {})[key] = tensor
    whole = {"state": values, "param_groups": state["param_groups"]}
    kept = ("weight_decay", "betas", "eps", "foreach")
    asked = [{name: group[name] for name in kept if name in group} for group in optimizer.param_groups]
    try:
        sharded.set_optimizer_state_dict(
            model, optimizer, whole, options=sharded.StateDictOptions(full_state_dict=True)
        )
    except (KeyError, RuntimeError, AssertionError, TypeError, AttributeError) as error:  # torch raises any of these
        raise ValueError(
            f"{path} was written with another optimiser or other frozen parameters ({error}): give the --optimizer, "
            "--lock-image and --lock-text of that run, or start a new run"
        ) from error
    for p, of_parameter in optimizer.state.items():  # fused optimisers read all tensors in the order of the parameter
        for key, x in of_parameter.items():
            if x.shape == p.shape and x.stride() != p.stride():
                of_parameter[key] = torch.empty_like(p).copy_(x)
    for group, options in zip(optimizer.param_groups, asked):  # options of this run, which may have changed
        group.update(options)
    return int(state["step"])


def read_state(path: Path, *needed: str) -> dict[str, Any]:
    """Return the contents of a checkpoint's state.json: the step and the values that `take_snapshot` was given.

    Args:
        needed: names that must be present.

    Raises:
        FileNotFoundError: `path` is not a checkpoint.
        ValueError: state.json is damaged: a needed value is missing or has the wrong type.
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
            raise ValueError(f"{file} is damaged: {name!r} must be {_WORDS[kind]}, got {value!s:.40}")
    return state


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest undamaged checkpoint of a folder, or None if there are no checkpoints.

    Damaged checkpoints, whose files do not match the manifest, are skipped with a warning.

    Raises:
        ValueError: all checkpoints are damaged.
    """
    problems = []
    for path in reversed(_by_step(folder)):
        try:
            check_manifest(path)
        except ValueError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            logger.warning("%s: using the older checkpoint %s", problem, path.name)
        return path
    if problems:
        raise ValueError(f"all checkpoints in {folder} are damaged: {'; '.join(problems)}")
    return None


def find_checkpoint(resume: str, output: Path) -> Path | None:
    """Return the checkpoint that ``--resume`` names, after checking all its files against the manifest.

    Args:
        resume: "auto" for the newest undamaged checkpoint of `output`, the path of a checkpoint, or the path of a run,
            whose newest undamaged checkpoint is taken.

    Returns:
        The path, or None if `resume` is "auto" and there is no checkpoint yet.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the checkpoint, or each checkpoint of the run, is damaged. The message names the file.
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
        raise FileNotFoundError(f"--resume {resume} holds no checkpoint, neither directly nor in checkpoints/")
    return checkpoint


def set_aside_after(folder: Path, step: int) -> None:
    """Rename checkpoints of steps after `step` to ``aside-step-...``, before a run resumes at `step`.

    Such checkpoints are damaged, or belong to steps that the run is about to repeat.
    """
    for path in _by_step(folder):
        if _step(path) > step:
            name = set_aside(path).name
            logger.warning(
                "%s belongs to a step after step %d, at which this run begins: renamed to %s", path, step, name
            )


def set_aside_run(folder: Path) -> None:
    """Rename the metrics and checkpoints of a run in `folder` to ``aside-...``.

    This is done before another run's checkpoint is resumed in the folder. Otherwise the metrics of the two runs would
    be mixed, and `find_checkpoint` might return a checkpoint of the wrong run.
    """
    left = [path for name in ("metrics.jsonl", "tensorboard", "wandb-id") if (path := folder / name).exists()]
    for path in (*left, *_by_step(folder / "checkpoints")):
        logger.warning(
            "%s belongs to another run than the one that resumes here: renamed to %s", path, set_aside(path).name
        )


def mend_checkpoints(folder: Path) -> None:
    """Remove the partial checkpoints that processes left in `folder` when they died."""
    mend_folders(folder, "step-*")


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _by_step(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)), key=_step)


def _storages(model: nn.Module, optimizer: torch.optim.Optimizer) -> set[int]:
    """Return the addresses of all storages that training modifies in place."""
    from torch.distributed.tensor import DTensor

    states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    tensors = [*model.parameters(), *model.buffers(), *states]
    locals_ = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
    return {x.untyped_storage().data_ptr() for x in locals_}


def _apart(x: Tensor, live: set[int]) -> Tensor:
    """Return `x`, cloned if training modifies its storage, else as it is."""
    x = x.detach().contiguous()
    return x.clone() if x.untyped_storage().data_ptr() in live else x


def _whole() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True)


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name, unsharded and on the host.

    Every rank must call this function. On a CPU the tensors are the model's own, not copies.
    """
    import torch.distributed.checkpoint.state_dict as sharded

    state: Any = sharded.get_model_state_dict(model, options=_whole())  # torch's annotation also allows nested dicts
    return state


def _set_model_state(model: nn.Module, file: Path) -> None:
    import torch.distributed.checkpoint.state_dict as sharded

    tensors: Any = read_tensors(file)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wrong = sorted(expected.keys() ^ tensors.keys()) or [n for n, x in tensors.items() if x.shape != expected[n]]
    if wrong:
        raise ValueError(
            f"{file} belongs to another model: {', '.join(wrong[:5])} {'differs' if len(wrong) == 1 else 'differ'}"
        )
    sharded.set_model_state_dict(model, tensors, options=sharded.StateDictOptions(full_state_dict=True))
