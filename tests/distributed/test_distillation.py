"""The distillation loss over the shards of 1, 2, 3 and 4 processes (gloo), compared with one process in fp64."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastclip
from fastclip.parity.promised import FP32_GRADIENT, LOSS, SCALE_GRADIENT
from support import distilled
from support.distilled import CASES, OPTIONS, SCALE, SHARDS, TEACHER_SCALES
from support.once import once

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks are forked")


@functools.cache
def ranks(W: int) -> list[Any]:
    """Return the results of every rank."""

    def start(folder: Path) -> None:
        command = [sys.executable, distilled.__file__, str(W), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]

    folder = once(f"distilled ranks {W}", start)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(W)]


@pytest.fixture(params=(1, 2, 3, 4), ids=lambda W: f"W={W}")
def W(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(params=(2, 3, 4), ids=lambda W: f"W={W}")
def several(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def one_process(shards: str, W: int, dtype: torch.dtype, **options: Any) -> Any:
    image, text, a, b, c, d = (x.double() for x in distilled.whole(shards, W, dtype))
    teachers = [a, c], [b, d], TEACHER_SCALES
    if "reduction" in options:
        return fastclip.distillation_loss(image, text, SCALE, *teachers, **options)
    return distilled.run(lambda *x: fastclip.distillation_loss(*x, *teachers, **OPTIONS), image, text)


@pytest.mark.parametrize("k", range(len(CASES)), ids=lambda k: f"{CASES[k][0]}-{CASES[k][1]}")
def test_loss_and_gradients_accurate(k: int, W: int) -> None:
    """The mean over ranks is the loss of the batch and its gradient with respect to the scale. The gradients of a
    rank's features are W times those of the batch.
    """
    shards, dtype = CASES[k]
    expected = one_process(shards, W, dtype)
    losses, images, texts, scales = zip(*(of_rank["accuracy"][k] for of_rank in ranks(W)))
    exact, half = dtype == torch.float64, dtype == torch.bfloat16
    loss, d_scale = (float(torch.stack(x).double().mean()) for x in (losses, scales))
    assert loss == pytest.approx(float(expected[0]), rel=1e-13 if exact else LOSS)
    assert d_scale == pytest.approx(float(expected[3]), rel=1e-12 if exact else 5e-2 if half else SCALE_GRADIENT)
    for found, true in ((images, expected[1]), (texts, expected[2])):
        error = (torch.cat(found).double() - W * true).norm() / (W * true).norm()
        assert error <= (1e-13 if exact else 1e-2 if half else FP32_GRADIENT)


def test_none_is_the_ranks_own_losses(W: int) -> None:
    expected = one_process("unequal", W, torch.float64, reduction="none")
    for ours, true in zip(zip(*(of_rank["none"] for of_rank in ranks(W))), expected):
        torch.testing.assert_close(torch.cat(ours), true)


def test_equal_shards_change_no_bit(W: int) -> None:
    assert all(of_rank["same_bits"] for of_rank in ranks(W))


def test_a_rank_multiplies_its_share(W: int) -> None:
    """A rank takes its part of 6 M N D operations of the student, and of 4 M N D of each teacher, without the product
    that its forward pass leaves in the workspace.
    """
    share = W * SHARDS["large"][0] ** 2
    for of_rank in ranks(W):
        assert of_rank["operations"] == share * (6 * 10 + 4 * (6 + 16))


def test_module_is_open_clips(several: int) -> None:
    """The module agrees with open_clip's with local_loss and gather_with_grad: value and gradients of the features on
    every rank, and the gradient of the scale in its mean.
    """
    found = [of_rank["open_clip"] for of_rank in ranks(several)]
    if not found[0]:
        pytest.skip("open_clip is not installed")
    for k in range(2):
        for of_rank in found:
            torch.testing.assert_close(of_rank[k][:3], of_rank[2 + k][:3], rtol=1e-6, atol=1e-7)
        ours, theirs = (torch.stack([of_rank[j][3] for of_rank in found]).mean() for j in (k, 2 + k))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.fault("Teachers of the ranks differ", "Every rank raises an error, and none hangs")
def test_ranks_that_disagree_raise_everywhere(several: int) -> None:
    for rank, of_rank in enumerate(ranks(several)):
        errors = of_rank["refusals"]
        assert "disagree on teacher_logit_scale: 3.0 on rank 0" in errors["scale"]
        assert "disagree on teachers: [(" in errors["D"]
        told = "a teacher needs features of the student's images, on their device: teacher_image_features (3, 5)"
        assert errors["rows"].startswith(told if rank == several - 1 else f"rank {several - 1} of the group refused")
