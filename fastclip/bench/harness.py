"""Timing in paired rounds. The results, one row per provider, can be appended to a CSV file.

A round runs every provider once, one after another. Each figure that compares two providers is the median of the ratios
within rounds, because the speed of the machine may drift between rounds, but hardly within one.
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
    """The measured case: loss ("softmax" or "sigmoid"), mode ("forward", "backward" or "both"), sizes and dtype."""

    loss: str
    mode: str
    N: int
    D: int
    dtype: str

    @property
    def products(self) -> int:
        """Least number of matrix products, of 2 N^2 D operations each, that the loss needs."""
        if self.loss == "sigmoid":
            return {"both": 3}[self.mode]  # the forward pass of the sigmoid loss also computes its gradients
        return {"forward": 1, "backward": 3, "both": 4}[self.mode]

    @property
    def flops(self) -> float:
        return 2 * self.products * float(self.N) ** 2 * self.D

    @property
    def dense_bytes(self) -> float:
        """Memory of a dense loss in bytes: logits and gradients of both directions, plus a quarter for temporaries."""
        itemsize: int = getattr(torch, self.dtype).itemsize
        return 1.25 * 4 * self.N**2 * itemsize


@dataclass(frozen=True)
class Provider:
    """A loss to be timed. `prepare()`, which is not timed, returns the timed step.

    The recorded time is the duration of the step, multiplied by the factor `times`. If the step does
    another amount of work than the case, the factor is the ratio of the work of the case to that of the step.
    """

    name: str
    prepare: Callable[[], Step]
    times: float = 1.0


def wall_clock(step: Step) -> float:
    """Return the duration of a step in seconds."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


@dataclass
class Timings:
    """Times of every round in seconds, by provider."""

    rounds: dict[str, list[float]] = field(default_factory=dict)
    clock: Callable[[Step], float] = wall_clock

    def time(self, provider: Provider) -> None:
        seconds = self.clock(provider.prepare())
        self.rounds.setdefault(provider.name, []).append(provider.times * seconds)

    def ratio(self, name: str, other: str, digits: int, unit: float = 1.0) -> float | str:
        """Return the speed of a provider relative to `other`, multiplied by `unit`, or "" if `other` was not run."""
        if other not in self.rounds:
            return ""
        ratios = (b / a for a, b in zip(self.rounds[name], self.rounds[other], strict=True))
        return round(unit * statistics.median(ratios), digits)


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[round(q * (len(ordered) - 1))]


def rows(case: Case, timings: Timings, *, floor: str, peer: str, peak_mib: dict[str, float]) -> list[dict[str, Any]]:
    """Return one row per provider, with the columns that `benchmarks/README.md` describes."""
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
    """Raise ValueError if the CSV file exists and its columns are not `columns`."""
    if path.exists():
        with path.open(newline="") as file:
            header = next(csv.reader(file), [])
        if header != columns:
            raise ValueError(
                f"{path} has other columns ({', '.join(header)}) than this benchmark: rename it, or choose another file"
            )


def append(path: Path, new: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Append rows to a CSV file, each followed by the values of `about`, which describe the machine.

    Raise ValueError if the file has other columns.
    """
    columns = [*new[0], *about]
    path.parent.mkdir(parents=True, exist_ok=True)
    check_columns(path, columns)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if fresh:
            writer.writeheader()
        writer.writerows({**row, **about} for row in new)
