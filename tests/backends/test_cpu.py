"""Properties of the CPU backend alone: instruction sets and blocks of its workspace.
losses/test_accuracy.py has the rest.
"""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastclip
from fastclip._backends.cpu import native
from support.accuracy import check, counted_products, leaves, pairs, random_labels
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


# The host bounds the time of a step on few rows, so its calls (Python's and C's functions) are counted.


def loss_of(*given: Tensor, normalize: bool) -> Tensor:
    function = fastclip.contrastive_loss if len(given) == 3 else fastclip.sigmoid_loss
    return function(*given, normalize=normalize)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("scalars", "calls", "allocations"), [((14.0,), 151, 5), ((14.0, -5.0), 160, 11)], ids=["softmax", "sigmoid"]
)
def test_calls_and_allocations_of_a_step_on_few_rows(
    monkeypatch: pytest.MonkeyPatch, scalars: tuple[float, ...], calls: int, allocations: int, normalize: bool
) -> None:
    for name in ("FASTCLIP_BACKEND", "FASTCLIP_WORKSPACE_MB"):
        monkeypatch.delenv(name, raising=False)
    given = leaves(*pairs(64, 64, 512), *scalars)
    for _ in range(3):
        loss_of(*given, normalize=normalize).backward()
    with cProfile.Profile() as profile:
        loss_of(*given, normalize=normalize).backward()
    assert pstats.Stats(profile).total_calls - 2 <= calls, "less this test's own two"
    with torch.profiler.profile() as events:
        loss_of(*given, normalize=normalize).backward()
    made = [event.name for event in events.events() if event.name in ("aten::empty", "aten::empty_strided")]
    assert len(made) - 1 <= allocations, "the first gradient is autograd's own"


@pytest.mark.parametrize("normalize", [False, True])
def test_three_products_of_few_rows(monkeypatch: pytest.MonkeyPatch, normalize: bool) -> None:
    """The backward pass reuses the forward pass's block of products and overwrites it, so a second
    backward pass multiplies again.
    """
    given = leaves(*pairs(64, 64, 512), 14.0)
    operations = counted_products(monkeypatch)
    value = loss_of(*given, normalize=normalize)
    first = torch.autograd.grad(value, given, retain_graph=True)
    assert operations == [2 * 64 * 64 * 512] * 3
    again = torch.autograd.grad(value, given)
    assert len(operations) == 6
    assert all(torch.equal(a, b) for a, b in zip(first, again))
