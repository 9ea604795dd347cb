"""The fused losses against its peers and against the matrix products alone, on this machine's CPU."""

from __future__ import annotations

import pytest

from benchmarks.harness import Case, Timings, append, rows
from benchmarks.losses import FLOOR, MODES, PEER, named, setup
from benchmarks.peak_memory import measure_in_child

D = 512


@pytest.fixture
def wanted(request) -> list[str]:
    try:
        return named(request.config.getoption("providers"))
    except ValueError as error:  # once, not once for every case
        pytest.exit(f"--providers: {error}", returncode=pytest.ExitCode.USAGE_ERROR)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("loss", "mode"), [(loss, mode) for loss, modes in MODES.items() for mode in modes])
def test_speed(benchmark, request, wanted: list[str], loss: str, mode: str, N: int, dtype: str) -> None:
    case = Case(loss, mode, N, D, dtype)
    providers = setup(case, wanted)
    if {provider.name for provider in providers} <= {FLOOR}:
        pytest.skip(f"none of {', '.join(wanted)} is for this mode and fits into memory")
    for provider in providers:
        provider.prepare()()
    timings = Timings()
    *others, last = providers

    def one_round() -> tuple[tuple, dict]:
        for provider in others:
            timings.time(provider)
        return (), {}

    # pytest-benchmark's own table has the last provider (fastclip, where chosen), prepare() included; the rows have not
    def timed() -> None:
        timings.time(last)

    benchmark.pedantic(timed, setup=one_round, rounds=25 if N <= 2048 else 11 if N <= 4096 else 5 if N <= 8192 else 3)

    peak = {}
    if mode == "both" and not request.config.getoption("no_peak"):
        losses = [provider.name for provider in providers if provider.name != FLOOR]
        peak = {name: measure_in_child(case, name) for name in losses}
    new = rows(case, timings, floor=FLOOR, peer=PEER, peak_mib=peak)
    benchmark.extra_info.update({row["provider"]: row for row in new})
    append(request.config.getoption("rows"), new)
