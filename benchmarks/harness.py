"""The harness of `fastclip bench` for all benchmarks here, whose rows also contain the measured commit."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import fastclip.bench.harness
from fastclip.bench.harness import Case, Provider, Step, Timings, quantile, rows, wall_clock
from fastclip.bench.provenance import about_cpu

__all__ = ["Case", "Provider", "Step", "Timings", "append", "commit", "machine", "quantile", "rows", "wall_clock"]


def commit() -> str:
    """Return the commit that is checked out, with "+changes" if anything but rows has changed since."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip() if done.returncode == 0 else ""

    changes = git("status", "--porcelain", "-uno", "--", ":(top)", ":(top,exclude)benchmarks/results")
    return git("rev-parse", "--short", "HEAD") + ("+changes" if changes else "")


def machine() -> dict[str, Any]:
    """Return the columns that describe the machine in every row."""
    return about_cpu(commit())


def append(path: Path, new: list[dict[str, Any]], about: dict[str, Any] | None = None) -> None:
    """Add rows to a CSV, whose columns never change. `about` describes the machine (default: `machine()`)."""
    fastclip.bench.harness.append(path, new, about or machine())
