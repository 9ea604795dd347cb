"""The fused loss against open_clip's ClipLoss and against the matrix products alone, on this machine's CPU."""

from __future__ import annotations

import pytest

from benchmarks.contrastive import FLOOR, LOSSES, PEER, setup
from benchmarks.harness import Case, Timings, append, rows
from benchmarks.peak_memory import measure_in_child

D = 512


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["forward", "backward", "both"])
def test_contrastive_speed(benchmark, request, mode: str, N: int, dtype: str) -> None:
    case = Case(mode, N, D, dtype)
    providers = {provider.name: provider for provider in setup(case)}
    ours, others = providers.pop("fastclip"), providers
    for provider in (ours, *others.values()):
        provider.prepare()()
    timings = Timings()

    def one_round() -> tuple[tuple, dict]:
        for provider in others.values():
            timings.time(provider)
        return (), {}

    # pytest-benchmark's own table includes what prepare() does; the rows do not
    def timed() -> None:
        timings.time(ours)

    benchmark.pedantic(timed, setup=one_round, rounds=25 if N <= 2048 else 11 if N <= 4096 else 5 if N <= 8192 else 3)

    peak = {}
    if mode == "both" and not request.config.getoption("no_peak"):
        peak = {name: measure_in_child(name, N, D, dtype) for name in LOSSES}
    new = rows(case, timings, floor=FLOOR, peer=PEER, peak_mib=peak)
    benchmark.extra_info.update({row["provider"]: row for row in new})
    append(request.config.getoption("rows"), new)
