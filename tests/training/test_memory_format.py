"""Channels-last order of the convolutions of a run: which weights have it, and what it leaves as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from support import needs
from support.digits_run import digits_run
from support.processes import join_group

needs("train")

from safetensors.torch import load_file

from fastclip.models import create_model
from fastclip.training import Run, from_options, train
from fastclip.training.from_options import build_loss, build_model
from fastclip.training.ranks import World
from fastclip.training.step.update import Stepper

FILES = ("model", "optimizer", "ema")  # of a checkpoint
ALONE = World(0, 1, torch.device("cpu"), None)


def run(folder: Path, **changed: Any) -> Run:
    return train(digits_run(folder, **{"model": "RN-tiny", **changed}))


def weights(**changed: Any) -> list[bool]:
    """Return for each convolution of a run's image tower whether its weights are in channels-last order."""
    options = digits_run(Path("x"), label_smoothing=0.0, **changed)
    model = build_model(options, build_loss(options, ALONE), ALONE)
    kernels = [module.weight for module in model.visual.modules() if isinstance(module, nn.Conv2d)]
    return [x.stride(1) == 1 and x.stride(3) == x.shape[1] for x in kernels]


@pytest.mark.parametrize(
    ("model", "expected"), [("RN-tiny", True), ("align-tiny", True), ("ViT-tiny", False), ("florence-tiny", False)]
)
def test_only_convolutional_towers_are_channels_last(model: str, expected: bool) -> None:
    assert set(weights(model=model)) == {expected}


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"model": "align-tiny", "optimizer": "lamb", "lr": 1e-3},
        {"micro_batch": 8, "grad_checkpointing": True},
    ],
)
def test_losses_change_by_rounding_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    seen = run(tmp_path / "a", **changed).losses
    monkeypatch.setattr(from_options, "_CONVOLUTIONAL", ())
    assert seen == pytest.approx(run(tmp_path / "b", **changed).losses, rel=1e-4)


@pytest.mark.parametrize("changed", [{}, {"optimizer": "lamb", "lr": 1e-3}])
def test_resumed_run_has_the_same_bits_and_order(tmp_path: Path, changed: dict[str, Any]) -> None:
    changed = {"ema": 0.9, **changed}
    whole = run(tmp_path / "a", **changed)
    begun = run(tmp_path / "b", **changed, stop_after=1)
    assert begun.losses + run(tmp_path / "b", **changed, resume="auto").losses == whole.losses
    for file in ("model/model.safetensors", *(f"checkpoints/step-00000003/{x}.safetensors" for x in FILES)):
        ours, theirs = load_file(tmp_path / "a" / file), load_file(tmp_path / "b" / file)
        assert ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())
        assert all(x.is_contiguous() for x in ours.values())
    assert create_model(pretrained=tmp_path / "a" / "model").visual.stem.conv1.conv.weight.is_contiguous()


def order(x: Tensor) -> list[int]:
    """Return the strides of the dimensions that have several elements."""
    return [stride for size, stride in zip(x.shape, x.stride()) if size > 1]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("model", ["RN-tiny", "align-tiny"])
def test_gradients_of_a_wrapped_run_have_the_order_of_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parallel: str, model: str
) -> None:
    """DDP is slow, and warns once in a process, if weights change their order after it has made its buckets."""
    update, compared = Stepper._update, []

    def noted(self: Stepper, norm: Tensor, skip: Tensor | None = None) -> None:
        compared.extend(order(p.grad) == order(p) for p in self.model.parameters() if p.grad is not None)
        update(self, norm, skip)

    changed = {"model": model, "optimizer": "adamw", "lr": 5e-4}
    alone = run(tmp_path / "a", **changed).losses
    join_group(0, 1, tmp_path)
    try:
        monkeypatch.setattr(Stepper, "_update", noted)
        seen = run(tmp_path / "b", **changed, parallel=parallel).losses
    finally:
        dist.destroy_process_group()
    assert seen == pytest.approx(alone, rel=1e-4) and compared and all(compared)
