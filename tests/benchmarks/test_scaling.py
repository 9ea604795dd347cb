"""The sharded losses send and multiply as much as the model in docs/scaling.md states, and the
page's tables are the script's.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from support import ROOT, needs

needs("models")
if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch.distributed has no gloo", allow_module_level=True)


from benchmarks.ranks import scaling
from benchmarks.ranks import scaling_model as model
from benchmarks.ranks.distributed import COMPETITORS, PEER, Case, launch, rows


def test_counts_are_the_models() -> None:
    """Counted bytes and operations equal the model's. Value and gradients of every rank are compared with fp64, so
    that a wrong competitor raises.
    """
    case = Case(3, 64, 64, "bfloat16")  # in 16 bits, the ring's sums and Inf-CL's features are sent in fp32
    found = {row["provider"]: row for row in rows(case, launch(case, COMPETITORS))}
    operations = {"fastclip_ring": 1, "open_clip": 0.75 * case.W, PEER: 1.5, "inf_cl": 2.5}
    # The forward pass leaves its block of logits in the workspace, and it is not multiplied again
    operations["fastclip_gather"] = 0.75
    for name, units in operations.items():
        if found["inf_cl_ring"]["status"] and name == "inf_cl":  # not installed
            continue
        row = found[name]
        expected = model.sent(name, case.W, case.local_N, case.D, 2)
        assert (row["forward_bytes"], row["backward_bytes"]) == pytest.approx(expected, abs=1), name
        assert row["operations_8NND_W"] == pytest.approx(units), name
    assert found["fastclip_gather"]["calls"] == 5


def test_document_has_the_scripts_tables() -> None:
    document = (ROOT / "docs" / "scaling.md").read_text()
    for name, table in scaling.tables().items():
        assert table in document, f"{name}: run python -m benchmarks.ranks.scaling --tables"


@pytest.mark.parametrize("W", scaling.RANKS)
@pytest.mark.parametrize("N", scaling.BATCHES)
def test_model_stays_within_its_rates(W: int, N: int) -> None:
    """A form never computes faster than its measured rate, and hidden time is not counted twice."""
    for form in model.FORMS:
        for D, rate in model.RATE.items():
            t = model.time(form, W, N, D)
            operations, best = (12, model.GEMM) if form == PEER else (8, rate)
            assert t.products >= operations * N**2 * D / W / best
            assert min(t.memory, t.launches, t.exposed) >= 0
    assert model.memory("fastclip_ring", W, N, 768) < model.memory("fastclip_gather", W, N, 768)


def test_figure_is_drawn_and_small(tmp_path: Path) -> None:
    needs("train")
    scaling.draw(tmp_path / "scaling.png")
    for figure in (tmp_path / "scaling.png", scaling.FIGURE):
        assert figure.stat().st_size < 120_000
