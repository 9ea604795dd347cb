"""One case on a GPU: checks of the providers, then rounds, then rows, also for providers that could not run."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.device import Clocks, Gpu
from benchmarks.harness import Case, Provider, Step, Timings, rows
from benchmarks.losses.peers import PEERS, Loss
from benchmarks.losses.providers import FLOOR, OURS, PEER, check_one, fitting, leaves_of, load_losses, names, step_of
from fastclip.parity.truth import blockwise_truth
from fastclip.system.installed import installed_version

SECONDS = 120.0  # for a case's rounds, of which there are at least three

RunRounds = Callable[["GuardedTimings", list[Provider], int], None]


@dataclass
class LineUp:
    """Providers that run with their peak memory, and the reasons why the others do not."""

    providers: list[Provider] = field(default_factory=list)
    status: dict[str, str] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)


@dataclass
class GuardedTimings(Timings):
    """Timings in which a provider that fails in any round has a status and no rounds."""

    attempt: Callable[[str, Callable[[], Any]], str] = lambda name, action: str(action() or "")
    status: dict[str, str] = field(default_factory=dict)

    def time(self, provider: Provider) -> None:
        if provider.name in self.status:
            return
        if reason := self.attempt(provider.name, lambda: super(GuardedTimings, self).time(provider)):
            self.status[provider.name] = reason
            self.rounds.pop(provider.name, None)


def _rotating(case: Case, loss: Loss, sets: list[tuple[Tensor, ...]]) -> Callable[[], Step]:
    """Return steps that use the sets of inputs in turn, so that no step finds its inputs in the L2."""
    turn = itertools.cycle(sets)
    return lambda: step_of(case, loss, next(turn))


def check_and_measure(
    gpu: Gpu, case: Case, name: str, loss: Loss, leaves: tuple[Tensor, ...], expected: tuple[Tensor, ...]
) -> float:
    """Check value and gradients at the full size, and return the MiB of a step at its peak
    beyond features and gradients.
    """
    for x in leaves:
        x.grad = torch.ones_like(x)  # part of the baseline
    before = gpu.allocated_bytes()
    check_one(name, loss, leaves, expected)
    if case.mode != "both":
        return 0.0

    def step() -> None:
        for x in leaves:
            x.grad = None
        loss(*leaves).backward()

    return (gpu.peak_bytes(step) - before) / 2**20


def line_up(case: Case, wanted: Iterable[str], gpu: Gpu) -> LineUp:
    """Return the floor and every provider that passes the check."""
    out = LineUp()
    torch.compiler.reset()
    sets = [leaves_of(case, gpu.device)]
    count = gpu.sets(sum(x.nbytes for x in sets[0]))
    sets += [leaves_of(case, gpu.device, seed) for seed in range(1, count)]

    losses, out.status = load_losses(case.loss, "cuda", wanted)
    for name in set(losses) - set(fitting(case, losses, float("inf"))):
        out.status[name] = "only whole steps"
    expected = blockwise_truth(case.loss, sets[0])
    for name in fitting(case, losses, float("inf")):
        if not fitting(case, [name], gpu.available_bytes()):
            out.status[name] = f"does not fit: {case.dense_bytes / 2**30:.0f} GiB"
            continue
        peak: list[float] = []
        prepare = _rotating(case, losses[name], sets)

        def first_steps(name: str = name, prepare: Callable[[], Step] = prepare, peak: list[float] = peak) -> None:
            peak.append(check_and_measure(gpu, case, name, losses[name], sets[0], expected))
            prepare()()  # warm-up in this mode

        if reason := gpu.attempt(name, first_steps):
            out.status[name] = reason
            continue
        out.providers.append(Provider(name, prepare))
        if case.mode == "both":
            out.peak_mib[name] = round(peak[0], 1)
    out.providers.insert(0, Provider(FLOOR, lambda: gpu.gemm, times=case.flops / gpu.gemm_flops))
    return out


def rounds_for(case: Case, timings: Timings, providers: list[Provider], seconds: float | None = None) -> int:
    """Return the number of rounds that fit into `seconds` (default: SECONDS), from one round that is not counted."""
    start = time.perf_counter()
    for provider in providers:
        timings.time(provider)
    one = time.perf_counter() - start
    timings.rounds.clear()
    most = 25 if case.N <= 8192 else 15 if case.N <= 32768 else 9
    return max(3, min(most, int((SECONDS if seconds is None else seconds) / one)))


def measured(
    case: Case, wanted: Iterable[str], gpu: Gpu, run_rounds: RunRounds, seconds: float | None = None
) -> list[dict[str, Any]]:
    """Return the rows of a case, whose rounds take about `seconds` and are run by `run_rounds`. Raises DeviceLost."""
    lined = line_up(case, wanted, gpu)
    timings = GuardedTimings(clock=gpu.clock, attempt=gpu.attempt)
    rounds = rounds_for(case, timings, lined.providers, seconds)
    with Clocks() as clocks:
        run_rounds(timings, lined.providers, rounds)
    return gpu_rows(case, lined, timings, gpu, clocks)


def own_failures(rows: list[dict[str, Any]]) -> list[str]:
    """Return the failures of fastclip's available backends among the rows."""
    failed = (row for row in rows if row["provider"] in OURS["cuda"] and row["status"])
    return [f"{row['provider']}: {row['status']}" for row in failed if not row["status"].startswith("not available")]


def gpu_rows(case: Case, lined: LineUp, timings: GuardedTimings, gpu: Gpu, clocks: Clocks) -> list[dict[str, Any]]:
    """Return a row for every provider: figures, or a status and blanks."""
    measured = rows(case, timings, floor=FLOOR, peer=PEER, peak_mib=lined.peak_mib)
    (gemm,) = (round(row["tflops"], 1) for row in measured if row["provider"] == FLOOR)
    ceilings = (gemm, gpu.copy_gbs(), clocks.sm_mhz, clocks.memory_mhz)
    out = [_complete(row, "", ceilings) for row in measured]
    for name, status in {**lined.status, **timings.status}.items():
        out.append(status_row(case, name, status, ceilings))
    order = [FLOOR, *names(case.loss, "cuda")]
    return sorted(out, key=lambda row: order.index(row["provider"]))


def status_row(case: Case, name: str, status: str, ceilings: tuple[Any, ...] = ("", "", "", "")) -> dict[str, Any]:
    """Return a row with the reason why there are no figures."""
    (row,) = rows(case, Timings({name: [1.0]}), floor=FLOOR, peer=PEER, peak_mib={})
    kept = {*asdict(case), "provider"}
    return _complete({column: row[column] if column in kept else "" for column in row}, status, ceilings)


def _complete(row: dict[str, Any], status: str, ceilings: tuple[Any, ...]) -> dict[str, Any]:
    peer = PEERS.get(row["provider"])
    about_run = dict(zip(("gemm_tflops", "copy_gbs", "sm_mhz", "memory_mhz"), ceilings, strict=True))
    return {**row, "status": status, "version": installed_version(peer.package) if peer else "", **about_run}
