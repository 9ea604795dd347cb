"""The host's part of a step of the losses of pairs, counted with a driver that does nothing (support/host.py)."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from support import host
from support.emulated import Missing

pytest.importorskip("triton")


class Ceiling(NamedTuple):
    """Ceilings of one step. Counts have a small margin for other versions of torch and Triton. Times differ by a third
    between machines and versions of torch (3.3 to 4.6, 2.9 to 3.5, 3.7 to 4.9 and 3.4 to 4.2 were measured).
    """

    calls: int
    launches: int  # includes products of the library
    allocations: int
    times: float  # in units of (s * s).backward()


CEILINGS = {
    ("contrastive", "triton"): Ceiling(150, 10, 7, 5.7),
    ("contrastive", "cuda"): Ceiling(140, 9, 7, 4.4),
    # Users change the scalars' gradients in place, so each has its own memory: one allocation more than the minimum
    ("sigmoid", "triton"): Ceiling(150, 6, 9, 6.1),
    ("sigmoid", "cuda"): Ceiling(140, 6, 9, 5.3),
}
CASES = [("triton", 90), ("triton", 80), ("cuda", 90)]  # Triton with tensor maps, and without
LOSSES = ["contrastive", "sigmoid"]


def _measured(what: str, loss: str, backend: str, capability: int, normalize: bool) -> Any:
    try:
        return host.measure(what, backend, normalize=normalize, capability=capability, loss=loss)
    except Missing as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("backend", "capability"), CASES)
@pytest.mark.parametrize("loss", LOSSES)
def test_step_within_counts(loss: str, backend: str, capability: int, normalize: bool) -> None:
    found, ceiling = _measured("counts", loss, backend, capability, normalize), CEILINGS[loss, backend]
    # One launch computes the bound on the logits. In the other cases the tiles do, or only float16 needs the bound.
    bound = loss == "contrastive" and backend == "triton" and not normalize
    assert found["launches"] <= ceiling.launches + bound, found
    assert found["products"] == 2, found
    assert found["allocations"] <= ceiling.allocations, found
    assert found["calls"] <= ceiling.calls, found


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("what", ["arguments", "public arguments"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("capability", [90, 80])
def test_known_launches_pass_what_the_first_ones_did(capability: int, normalize: bool, what: str, loss: str) -> None:
    """A launch that bypasses Triton's own path to the launcher passes the same arguments."""
    first, later = _measured(what, loss, "triton", capability, normalize)
    assert len(first) == (4 if loss == "sigmoid" else 8 if normalize else 9)
    for a, b in zip(first, later, strict=True):
        assert a == b


@pytest.mark.alone
@pytest.mark.parametrize(("loss", "backend"), CEILINGS)
def test_step_takes_a_few_times_the_least_there_is(loss: str, backend: str) -> None:
    """A step takes a small multiple of the thread's time of (s * s).backward()."""
    assert _measured("times", loss, backend, 90, True) <= CEILINGS[loss, backend].times
