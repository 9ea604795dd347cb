"""Paired rounds, one row a provider, rows in a CSV.

A round runs every provider once, one after the other, and each figure that compares two of them is the median of the
rounds' ratios: the machine's speed may drift between rounds, hardly within one.
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

__all__ = ["Case", "Provider", "Step", "Timings", "append", "check_columns", "quantile", "rows", "wall_clock"]

Step = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """What is measured: `loss` softmax or sigmoid; `mode` forward, backward or both; the features' sizes and dtype."""

    loss: str
    mode: str
    N: int
    D: int
    dtype: str

    @property
    def products(self) -> int:
        """Matrix products of 2 N^2 D operations that cannot be avoided."""
        if self.loss == "sigmoid":
            return {"both": 3}[self.mode]  # its gradients come out of the forward pass
        return {"forward": 1, "backward": 3, "both": 4}[self.mode]

    @property
    def flops(self) -> float:
        return 2 * self.products * float(self.N) ** 2 * self.D

    @property
    def dense_bytes(self) -> float:
        """Logits and their gradients in both directions, and a quarter for what comes and goes beside them."""
        itemsize: int = getattr(torch, self.dtype).itemsize
        return 1.25 * 4 * self.N**2 * itemsize


@dataclass(frozen=True)
class Provider:
    """`prepare()` is not timed and returns the step that is; what counts is `times` as long as the step takes."""

    name: str
    prepare: Callable[[], Step]
    times: float = 1.0


def wall_clock(step: Step) -> float:
    """Seconds."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


@dataclass
class Timings:
    """Seconds of every round, by provider."""

    rounds: dict[str, list[float]] = field(default_factory=dict)
    clock: Callable[[Step], float] = wall_clock

    def time(self, provider: Provider) -> None:
        seconds = self.clock(provider.prepare())
        self.rounds.setdefault(provider.name, []).append(provider.times * seconds)

    def ratio(self, name: str, other: str, digits: int, unit: float = 1.0) -> float | str:
        """How many times as fast as `other`, in units of 1 / `unit`; nothing where `other` was not run."""
        if other not in self.rounds:
            return ""
        ratios = (b / a for a, b in zip(self.rounds[name], self.rounds[other], strict=True))
        return round(unit * statistics.median(ratios), digits)


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[round(q * (len(ordered) - 1))]


def rows(case: Case, timings: Timings, *, floor: str, peer: str, peak_mib: dict[str, float]) -> list[dict[str, Any]]:
    """One row a provider; see `benchmarks/README.md` for the columns."""
    out = []
    for name, seconds in timings.rounds.items():
        median = statistics.median(seconds)
        out.append(
            {
                **asdict(case),
                "provider": name,
                "rounds": len(seconds),
                "median_ms": round(median * 1e3, 3),
                "p20_ms": round(quantile(seconds, 0.2) * 1e3, 3),
                "p80_ms": round(quantile(seconds, 0.8) * 1e3, 3),
                "tflops": round(case.flops / median / 1e12, 4),
                "floor_percent": timings.ratio(name, floor, 1, unit=100),
                f"speedup_over_{peer}": timings.ratio(name, peer, 3),
                "peak_mib": peak_mib.get(name, ""),
            }
        )
    return out


def check_columns(path: Path, columns: list[str]) -> None:
    """ValueError where the CSV is there and has others."""
    if path.exists():
        with path.open(newline="") as file:
            header = next(csv.reader(file), [])
        if header != columns:
            raise ValueError(f"{path} has other columns ({', '.join(header)}): move it away")


def append(path: Path, new: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Add rows to a CSV, whose columns never change; `about` where they were measured. ValueError for another file."""
    columns = [*new[0], *about]
    path.parent.mkdir(parents=True, exist_ok=True)
    check_columns(path, columns)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if fresh:
            writer.writeheader()
        writer.writerows({**row, **about} for row in new)
