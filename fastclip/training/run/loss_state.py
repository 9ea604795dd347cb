"""The state of a loss in a checkpoint: loss.safetensors, with the running means of the global loss."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fastclip.system.reading import read_tensors
from fastclip.training.run.checkpoints import Snapshot

__all__ = ["add_loss_state", "load_loss_state"]

_FILE = "loss"


def add_loss_state(snapshot: Snapshot, loss: nn.Module) -> None:
    """Add a copy of the state of `loss` to a snapshot. The state is the same on every rank."""
    snapshot.tensors[_FILE] = {name: x.to("cpu", copy=True) for name, x in loss.state_dict().items()}


def load_loss_state(path: Path, loss: nn.Module) -> None:
    """Load the state of `loss` from the checkpoint `path`. Every rank must call this function.

    Raises:
        ValueError: the checkpoint was written with another loss, or with a dataset of another size.
    """
    file = path / f"{_FILE}.safetensors"
    if not file.is_file():
        raise ValueError(
            f"{path} has no running means, because it was written without --loss global: give the --loss of that run, "
            "or start a new run"
        )
    tensors, expected = read_tensors(file), loss.state_dict()
    for name, x in expected.items():
        found = tensors.get(name)
        if found is None or found.shape != x.shape:
            size = "none" if found is None else f"{found.numel():,}"
            raise ValueError(
                f"{file} holds running means of another dataset: {size} where --data has {x.numel():,} samples. Give "
                "the --data of that run, or start a new run"
            )
    loss.load_state_dict(tensors)
