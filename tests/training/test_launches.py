"""Operations that an update gives to a device: their number must not depend on the number of parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from support import needs

needs("train")

from fastclip.models import DualEncoder, create_model
from fastclip.models.config import load_config
from fastclip.models.dual_encoder import build_model
from fastclip.training.run.checkpoints import load_checkpoint, take_snapshot, write_snapshot
from fastclip.training.step.moving_average import MovingAverage
from fastclip.training.step.optim import build_optimizer, clip_gradients, gradient_norm


class Launches(TorchDispatchMode):
    """Counter of the operations that Python calls. An operation over a list of tensors counts once, as on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counted[str(func)] += 1
        return func(*args, **(kwargs or {}))


def vit(layers: int) -> DualEncoder:
    config = load_config("ViT-tiny")
    towers = {name: replace(getattr(config, name), layers=layers) for name in ("vision_cfg", "text_cfg")}
    return build_model(replace(config, **towers))


def with_gradients(model: DualEncoder) -> DualEncoder:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return model


def lamb(model: DualEncoder, *, together: bool) -> torch.optim.Optimizer:
    """Return LAMB, which on a CPU processes tensors one by one unless this is changed."""
    optimizer = build_optimizer("lamb", model, lr=1e-2, weight_decay=0.1)
    if "foreach" not in optimizer.defaults:
        pytest.skip("LAMB of timm before 1.0.31 processes tensors one by one")
    for group in optimizer.param_groups:
        group["foreach"] = together
    return optimizer


def launches(optimizer: str, layers: int) -> dict[str, Counter[str]]:
    model = with_gradients(vit(layers))
    ours = (
        lamb(model, together=True)
        if optimizer == "lamb"
        else build_optimizer(optimizer, model, lr=1.0, weight_decay=0.1)
    )
    ema, counted = MovingAverage(model, 0.9), {}

    def count(name: str, part: Callable[[], Any]) -> Any:
        with Launches() as counter:
            result = part()
        counted[name] = counter.counted
        return result

    ours.step()  # makes the states
    norm = count("norm", lambda: gradient_norm(model.parameters()))
    count("clipping", lambda: clip_gradients(model.parameters(), 1.0, norm))
    count("update", ours.step)
    count("average", ema.update)
    count("zeros", ours.zero_grad)
    return counted


@pytest.mark.parametrize(("optimizer", "most"), [("adamw", 30), ("lamb", 90)])
def test_update_of_a_deeper_model_has_no_more_launches(optimizer: str, most: int) -> None:
    shallow, deep = (launches(optimizer, layers) for layers in (2, 4))
    assert shallow == deep
    together = sum(counter.total() for counter in deep.values())
    assert together <= most, (together, deep)
    # The step of LAMB is counted on the host
    waits = sum(counter["aten._local_scalar_dense.default"] for counter in deep.values())
    assert waits == (3 if optimizer == "lamb" else 0)


def test_lamb_processes_tensors_together_on_a_gpu_only() -> None:
    assert not any(group["foreach"] for group in build_optimizer("lamb", vit(1), lr=1.0, weight_decay=0.1).param_groups)
    model = create_model("ViT-tiny", device="meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        optimizer = build_optimizer("lamb", model.to_empty(device="cuda"), lr=1.0, weight_decay=0.1)
    assert all(group["foreach"] for group in optimizer.param_groups)


def test_checkpoint_of_a_cpu_leaves_tensors_together(tmp_path: Path) -> None:
    """LAMB on a CPU takes tensors one by one, and so did older versions of timm, whose groups do not say so."""
    model = with_gradients(vit(1))
    begun = lamb(model, together=False)
    begun.step()
    begun.zero_grad()
    about = {"options": {}, "samples": 2, "skipped": {}}
    for older in (False, True):
        snapshot = take_snapshot(model, begun, step=1 + older, about=about, writes=True)
        assert snapshot is not None
        for group in snapshot.state["param_groups"] if older else ():
            del group["foreach"], group["max_lr_snapshot"]
        resumed = lamb(model, together=True)
        assert load_checkpoint(write_snapshot(tmp_path, snapshot), model, resumed) == 1 + older
        assert all(group["foreach"] for group in resumed.param_groups)
        assert len(resumed.state) == len(begun.state) == len(list(model.parameters()))


def test_lamb_together_is_lamb_one_by_one() -> None:
    ends = []
    for together in (False, True):
        torch.manual_seed(0)
        model = create_model("align-tiny")
        optimizer = lamb(model, together=together)
        for _ in range(20):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
    for one, other in zip(*ends):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
