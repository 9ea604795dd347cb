"""The trainer on a GPU. Run with `pytest -m gpu`; skipped without a GPU."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from support import needs

needs("train")

from fastclip import contrastive_loss
from fastclip.data.batch import Batch
from fastclip.models import create_model
from fastclip.training import Run, TrainOptions, cached_step, train
from fastclip.training.from_options import placed
from fastclip.training.ranks import World
from fastclip.training.step.losses import named_loss
from fastclip.training.step.moving_average import MovingAverage
from fastclip.training.step.optim import build_optimizer
from fastclip.training.step.update import Stepper

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


def run(folder: Path, **changed: Any) -> Run:
    values: dict[str, Any] = {
        "data": "digits",
        "val_data": "digits",
        "model": "ViT-tiny",
        "output": str(folder),
        "context_length": 16,
        "loss": "unicl",
        "batch_size": 64,
        "max_steps": 8,
        "workers": 1,
        "device": "cuda",
    }
    return train(TrainOptions(**{**values, **changed}))


def near(ours: list[float], theirs: list[float], rel: float) -> bool:
    return len(ours) == len(theirs) and all(abs(a - b) <= rel * abs(b) for a, b in zip(ours, theirs))


def test_gpu_has_the_cpus_losses(tmp_path: Path) -> None:
    gpu, cpu = (run(tmp_path / device, device=device) for device in ("cuda", "cpu"))
    assert near(gpu.losses, cpu.losses, 1e-4)  # the encoders' products are summed in another order
    assert gpu.backend in ("triton", "cuda") and 0 <= gpu.validation["zero_shot_top1"] <= 1


@pytest.mark.parametrize("features_on", ["device", "cpu"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_micro_batches_have_the_same_losses(tmp_path: Path, precision: str, features_on: str) -> None:
    whole = run(tmp_path / "a", precision=precision)
    parts = run(tmp_path / "b", precision=precision, micro_batch=24, features_on=features_on)
    assert near(parts.losses, whole.losses, 1e-4 if precision == "fp32" else 2e-2)


def test_deterministic_run_repeats_bit_by_bit(tmp_path: Path) -> None:
    first, again = (run(tmp_path / k, model="align-tiny", context_length=None, deterministic=True) for k in "ab")
    assert not torch.are_deterministic_algorithms_enabled()
    assert first.losses == again.losses


def test_resumed_run_goes_on(tmp_path: Path) -> None:
    whole = run(tmp_path / "a", ema=0.9)
    begun = run(tmp_path / "b", ema=0.9, stop_after=3)
    rest = run(tmp_path / "b", ema=0.9, resume="auto")
    assert near(begun.losses + rest.losses, whole.losses, 1e-4)


def test_dropout_on_the_gpu_is_replayed_where_the_arguments_are_on_the_host() -> None:
    torch.manual_seed(0)
    tower = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.5), nn.Linear(32, 16)).cuda()
    x = torch.randn(64, 8)
    masks: list[torch.Tensor] = []
    tower[1].register_forward_hook(lambda module, args, out: masks.append(out.detach() == 0))

    def forward(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = tower(x.cuda())
        return features, features.flip(1), features.new_tensor(10.0)

    cached_step(forward, [(part,) for part in x.split(16)], contrastive_loss, modules=[tower])
    assert len(masks) == 8 and all(torch.equal(a, b) for a, b in zip(masks[:4], masks[4:]))


# Steps with LAMB wait a second time: it cannot skip an update on the device, so that the scale is read after the update
@pytest.mark.parametrize(("optimizer", "waits"), [("adamw", 1), ("lamb", 2)])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", ["ViT-tiny", "RN-tiny"])
def test_host_waits_once_in_a_step(name: str, optimizer: str, waits: int, parts: int) -> None:
    """torch warns about every call that makes the host wait for the device."""
    device, pairs = torch.device("cuda"), 32
    model = placed(create_model(name, context_length=16), device).train()
    assert model.config is not None
    side = model.config.vision_cfg.image_size
    step = Stepper(
        model,
        model,
        named_loss("clip"),
        build_optimizer(optimizer, model, lr=1e-3, weight_decay=0.1),
        World(0, 1, device, None),
        ema=MovingAverage(model, 0.9),
        max_grad_norm=0.5,
        autocast=torch.bfloat16,
    ).step
    size = pairs // parts
    batches = []
    for _ in range(parts):  # in pinned memory, as the trainer has them
        ids = torch.randint(1, 400, (size, 16)).pin_memory()
        images, labels = torch.randn(size, 3, side, side).pin_memory(), torch.arange(size).pin_memory()
        batches.append(Batch(images, ids, labels, tuple(map(str, range(size)))))
    for k in range(3):  # kernels are compiled and states are made
        step(batches, step=k)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for k in range(3, 7):
                step(batches, step=k)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    told = [one for one in caught if "synchronizing" in str(one.message)]
    assert len(told) == 4 * waits, "\n".join(f"{one.filename}:{one.lineno}" for one in told)
