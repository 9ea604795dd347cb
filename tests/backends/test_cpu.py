"""What only the CPU backend has: instruction sets, blocks of its workspace. The rest is losses/test_accuracy.py's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastclip._backends.cpu import native
from support.accuracy import check, pairs, random_labels
from support.kinds import CPU_KINDS, Kind, each_kind

pytestmark = pytest.mark.usefixtures("poisoned_memory")
FP32 = CPU_KINDS[0]


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        native.module.select_isa(request.param)
    except ValueError:
        pytest.skip(f"this processor has no {request.param}")
    assert native.module.isa() == request.param
    yield request.param
    native.module.select_isa("auto")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("labels", [False, True], ids=["diagonal", "labels"])
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_every_instruction_set_accurate(labels: bool, scale: float) -> None:
    image, text = pairs(130, 517, 24) if labels else pairs(517, 517, 24)
    y = random_labels(130, 517, 40) if labels else None
    check(FP32.loss(labels=y), image, text, scale, labels=y)
    spread = torch.logspace(-1, 1.5, len(image))[:, None]
    check(FP32.loss(labels=y, normalize=False), image * spread / 5, text / 5, 30.0, labels=y, normalize=False)


@pytest.mark.usefixtures("isa")
def test_sigmoid_accurate_on_every_instruction_set() -> None:
    image, text = pairs(517, 517, 24)
    check(FP32.loss(), image, text, 12.0, bias=-11.0)
    spread = torch.logspace(-1, 1.5, len(image))[:, None]  # logits from -1,000 to 1,000
    check(FP32.loss(normalize=False), image * spread / 5, text / 5, 30.0, bias=-5.0, normalize=False)


@pytest.mark.parametrize("megabytes", ["0.02", "0.3"])
@each_kind(CPU_KINDS)
def test_many_blocks_accurate(monkeypatch: pytest.MonkeyPatch, kind: Kind, megabytes: str) -> None:
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", megabytes)
    image, text = kind.pairs(700, 700, 24)
    check(kind.loss(), image, text, 20.0)


@pytest.mark.parametrize("megabytes", ["0.02", "0.3"])
@each_kind(CPU_KINDS)
def test_sigmoid_accurate_in_many_blocks(monkeypatch: pytest.MonkeyPatch, kind: Kind, megabytes: str) -> None:
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", megabytes)
    image, text = kind.pairs(700, 700, 24)
    check(kind.loss(), image, text, 10.0, bias=-8.0)
