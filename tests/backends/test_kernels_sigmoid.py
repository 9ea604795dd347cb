"""The GPU backends' sigmoid loss; see backends/test_kernels.py."""

from __future__ import annotations

import pytest
import torch

from support.accuracy import check, counted_products, poisoned
from support.kernels import GPU, KINDS, Kind, Launches, uneven

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), *([pytest.mark.gpu] if GPU else [])]


@pytest.mark.parametrize("kind", KINDS, ids=str, indirect=True)
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (100.0, -60.0), (0.0, -3.0), (-5.0, 2.0)])
@pytest.mark.parametrize("shape", [(1, 8), (7, 3), (129, 59), (300, 72)], ids=str)
def test_sigmoid_accurate(kind: Kind, shape: tuple[int, int], scale: float, bias: float) -> None:
    N, D = shape
    image, text = kind.pairs(N, N, D)
    check(kind.loss(), image, text, scale, bias=bias)


@pytest.mark.parametrize("kind", KINDS, ids=str, indirect=True)
def test_sigmoid_of_a_solved_batch_keeps_digits(kind: Kind) -> None:
    image, text = kind.pairs(100, 100, 64, aligned=1.0, noise=0.05)
    found = check(kind.loss(), image, text, 200.0, bias=-130.0)
    assert float(found.loss) < 1e-15


@pytest.mark.parametrize("kind", KINDS, ids=str, indirect=True)
def test_sigmoid_without_gradients_multiplies_once(
    kind: Kind, monkeypatch: pytest.MonkeyPatch, launches: Launches
) -> None:
    operations = counted_products(monkeypatch)
    image, text = kind.pairs(128, 128, 32)
    kind.loss()(image, text, torch.tensor(10.0), torch.tensor(-10.0))
    assert launches.names.count("sigmoid_fwd_kernel") == 1 and operations == []
    kind.loss()(image.requires_grad_(), text.requires_grad_(), torch.tensor(10.0), torch.tensor(-10.0))
    assert operations == [2 * 128 * 128 * 32] * 2


@pytest.mark.parametrize("kind", KINDS, ids=str, indirect=True)
def test_sigmoid_blocks(kind: Kind, monkeypatch: pytest.MonkeyPatch, launches: Launches) -> None:
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", "0.04")
    image, text = kind.pairs(200, 200, 24)
    check(kind.loss(), image, text, 10.0, bias=-10.0)
    image, text = (poisoned(x, kind.dtype) for x in uneven(200, 200))
    check(kind.loss(normalize=False), image, text, 0.05, bias=-4.0, normalize=False)
    assert launches.names.count("sigmoid_fwd_kernel") == 8
