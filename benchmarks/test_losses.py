"""The fused losses against their peers and against the matrix products alone, on this machine's CPU or GPU."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from benchmarks.gpu.case import measured, own_failures, status_row
from benchmarks.gpu.device import DeviceLost, Gpu
from benchmarks.harness import Case, Provider, Timings, append, rows
from benchmarks.losses.peak_memory import measure_in_child
from benchmarks.losses.providers import FLOOR, MODES, PEER, named, setup


@pytest.fixture
def wanted(request, device: str) -> list[str]:
    try:
        return named(request.config.getoption("providers"), device)
    except ValueError as error:  # once, instead of once per case
        pytest.exit(f"--providers: {error}", returncode=pytest.ExitCode.USAGE_ERROR)


@pytest.fixture
def gpu(device: str) -> Gpu | None:
    return Gpu() if device == "cuda" else None


@pytest.mark.parametrize(("loss", "mode"), [(loss, mode) for loss, modes in MODES.items() for mode in modes])
def test_speed(
    benchmark,
    request,
    gpu: Gpu | None,
    path: Path,
    wanted: list[str],
    loss: str,
    mode: str,
    size: tuple[int, int],
    dtype: str,
) -> None:
    case = Case(loss, mode, *size, dtype)
    if gpu is not None:
        on_gpu(benchmark, gpu, case, wanted, path)
    else:
        on_cpu(benchmark, case, wanted, path, peak=not request.config.getoption("no_peak"))


def run_rounds(benchmark, timings: Timings, providers: list[Provider], rounds: int) -> None:
    *others, last = providers

    def one_round() -> tuple[tuple, dict]:
        for provider in others:
            timings.time(provider)
        return (), {}

    # pytest-benchmark's own table shows the last provider (fastclip, if chosen) with prepare(); the rows leave
    # prepare() out
    def timed() -> None:
        timings.time(last)

    benchmark.pedantic(timed, setup=one_round, rounds=rounds)


def on_cpu(benchmark, case: Case, wanted: list[str], path: Path, peak: bool) -> None:
    N = case.N
    providers = setup(case, wanted)
    if {provider.name for provider in providers} <= {FLOOR}:
        pytest.skip(f"no provider of {', '.join(wanted)} supports this mode and fits into memory")
    for provider in providers:
        provider.prepare()()
    timings = Timings()
    rounds = 25 if N <= 2048 else 11 if N <= 4096 else 5 if N <= 8192 else 3
    run_rounds(benchmark, timings, providers, rounds)

    peaks = {}
    if case.mode == "both" and peak:
        losses = [provider.name for provider in providers if provider.name != FLOOR]
        peaks = {name: measure_in_child(case, name) for name in losses}
    new = rows(case, timings, floor=FLOOR, peer=PEER, peak_mib=peaks)
    benchmark.extra_info.update({row["provider"]: row for row in new})
    append(path, new)


def on_gpu(benchmark, gpu: Gpu, case: Case, wanted: list[str], path: Path) -> None:
    about = gpu.about()
    try:
        new = measured(case, wanted, gpu, functools.partial(run_rounds, benchmark))
    except DeviceLost as error:
        append(path, [status_row(case, *error.args)], about)
        pytest.exit(f"{error.args[0]}: {error.args[1]}; nothing more runs in this process", returncode=1)
    append(path, new, about)
    assert not own_failures(new)
