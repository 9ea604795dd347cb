"""The sharded losses send and multiply what the model of docs/scaling.md says, counted; its tables are the script's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytest.importorskip("open_clip", reason="open_clip, which the benchmark compares with, is not installed")
if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch.distributed has no gloo", allow_module_level=True)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed

from benchmarks import scaling  # noqa: E402
from benchmarks.distributed import COMPETITORS, PEER, Case, launch, rows  # noqa: E402


def test_counts_are_the_models() -> None:
    """Value and gradients are checked against fp64 on every rank: a competitor that is wrong raises."""
    case = Case(3, 64, 64, "bfloat16")  # 16-bit: the ring's sums and Inf-CL's features travel in fp32
    found = {row["provider"]: row for row in rows(case, launch(case, COMPETITORS))}
    operations = {"fastclip_ring": 1, "open_clip": 0.75 * case.W, PEER: 1.5, "inf_cl": 2.5}
    # The block of logits that the forward pass leaves in the workspace is not multiplied again
    operations["fastclip_gather"] = 0.75
    for name, units in operations.items():
        if found["inf_cl_ring"]["status"] and name == "inf_cl":  # not installed
            continue
        row = found[name]
        expected = scaling.sent(name, case.W, case.local_N, case.D, 2)
        assert (row["forward_bytes"], row["backward_bytes"]) == pytest.approx(expected, abs=1), name
        assert row["operations_8NND_W"] == pytest.approx(units), name
    assert found["fastclip_gather"]["calls"] == 5
