"""Counters of Nsight Compute (ncu) for one launch of each tile kernel of the CUDA backend.

python -m benchmarks.gpu.counters --size 32768x512     the profiled steps alone
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.gpu.checklist import run_limited
from benchmarks.gpu.log import Log
from benchmarks.harness import Case
from benchmarks.losses.cases import parse_sizes, size_name
from benchmarks.losses.providers import OURS, leaves_of, ours, step_of

SIZE = {False: (32768, 512), True: (48, 32)}
KERNELS = {"statistics": "Statistics", "weights": "Weigh", "sigmoid": "Sigmoid"}  # classes that `tile_kernel` takes
LAUNCHES = 12  # at most; a kernel is launched for each panel of the workspace, and the first launch counts
SECTIONS = ("SpeedOfLight", "WarpStateStats", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "InstructionStats")
# Metrics of Hopper (sm_90) that no section above is certain to contain
METRICS = (
    "gpu__time_duration.sum",
    "sm__cycles_elapsed.avg.per_second",  # the clock of the multiprocessors
    "smsp__inst_executed.sum",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "lts__t_bytes.sum",
    "lts__t_sector_hit_rate.pct",
    "smsp__average_warps_issue_stalled_gmma_per_issue_active.ratio",
)
KEPT = re.compile(
    r"gpu__time_duration\.sum|sm(sp)?__inst_executed\.sum|smsp__average_warps_issue_stalled_\w+_per_issue_active\.ratio"
    r"|(sm|smsp|gpc)__cycles_elapsed\.(max|avg\.per_second)|\w+throughput\w*\.avg\.pct_of_peak_sustained_elapsed"
    r"|sm__(inst_executed_)?pipe_tensor\w*\.(sum|avg\.pct_of_peak_sustained_(elapsed|active))"
    r"|smsp__(issue_active|warps_active|warps_eligible)\.avg\.per_cycle_active"
    r"|l1tex__data_(pipe_lsu_wavefronts|bank_conflicts_pipe_lsu)_mem_shared\.(sum|avg\.pct_of_peak_sustained_elapsed)"
    r"|lts__t_(bytes\.sum|sector_hit_rate\.pct)"
)

Metric = tuple[str, str, float]  # name, unit, value


def run(log: Log) -> None:
    target = [sys.executable, "-m", "benchmarks.gpu.counters", "--size", size_name(SIZE[log.gpu.pretended])]
    if log.gpu.pretended:
        target.append("--dry-run")
    ncu = shutil.which("ncu")
    if ncu is None or log.gpu.pretended:  # a dry run only shows that the steps run
        log.status("ncu", "", "not installed" if ncu is None else "there is no GPU to count on")
        if log.gpu.pretended and (code := run_limited(target, log.left())):
            raise RuntimeError(f"the profiled steps ended with exit code {code}")
        return
    with TemporaryDirectory() as folder:
        # ncu ends at a name that its version does not know; then only the sections are requested
        for metrics in (METRICS, ()):
            path = Path(folder) / f"{len(metrics)}.csv"
            code = run_limited([*command(ncu, path, metrics), *target], log.left() * (0.7 if metrics else 1))
            text = path.read_text() if path.exists() else ""
            counted = list(parse(text))
            failure = "" if counted else reason(text, code)
            if counted:
                break
    for kernel, metrics_of in counted:
        for name, unit, value in metrics_of:
            log.row(f"{kernel} {size_name(SIZE[False])}", "fastclip_cuda", name, unit, value)
    for kernel in KERNELS:
        if kernel not in dict(counted):
            log.status(kernel, "fastclip_cuda", failure or "ncu saw no launch of it")


def command(ncu: str, path: Path, metrics: tuple[str, ...]) -> list[str]:
    """Return ncu's command line, to which the program's is appended: rows of a CSV in `path`, with unchanged clocks."""
    sections = [word for name in SECTIONS for word in ("--section", name)]
    chosen = ["--metrics", ",".join(metrics)] if metrics else []
    names = "|".join(f"{name}<" for name in KERNELS.values())
    which = ["--kernel-name-base", "demangled", "--kernel-name", f"regex:{names}", "--launch-count", str(LAUNCHES)]
    form = ["--csv", "--page", "raw", "--print-units", "base", "--log-file", str(path)]
    return [ncu, "--clock-control", "none", "--profile-from-start", "off", *sections, *chosen, *which, *form]


def parse(text: str) -> Iterator[tuple[str, list[Metric]]]:
    """Read ncu's raw page in CSV, which follows its messages. Yields the numeric metrics in KEPT for the first
    launch of every kernel in KERNELS.
    """
    lines = text.splitlines()
    first = next((k for k, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    table = list(csv.reader(line for line in lines[first:] if not line.startswith("==")))
    if len(table) < 3:
        return
    header, units, *launches = table
    seen: set[str] = set()
    for cells in launches:
        row = dict(zip(header, cells))
        name = row.get("Kernel Name", "")
        kernel = next((key for key, word in KERNELS.items() if re.search(rf"\b{word}<", name)), "")
        if not kernel or kernel in seen:
            continue
        seen.add(kernel)
        metrics = [
            (name, unit, _number(cell)) for name, unit, cell in zip(header, units, cells) if KEPT.fullmatch(name)
        ]
        yield kernel, [(name, unit, value) for name, unit, value in metrics if value is not None]


def _number(cell: str) -> float | None:
    try:
        return float(cell.replace(",", ""))
    except ValueError:  # n/a
        return None


def reason(text: str, code: int | None) -> str:
    """Return the reason for missing counters: ncu's error message, or how it ended."""
    words = [line.strip("= ") for line in text.splitlines() if line.startswith("==ERROR==")]
    if words:
        return words[0].removeprefix("ERROR").strip("= ")[:200]
    return "ncu took too long" if code is None else f"ncu left no counters, exit code {code}"


def steps(size: tuple[int, int], backend: str | None, device: str) -> None:
    """Run a step of each loss in the profiled range, after one outside of it."""
    losses: list[tuple[Any, Any]] = []
    for kind in ("softmax", "sigmoid"):
        case = Case(kind, "both", *size, "bfloat16")
        losses.append((case, ours(backend, kind)))
    every = [step_of(case, loss, leaves_of(case, device)) for case, loss in losses]
    for counted in (False, True):
        if counted and device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        for step in every:
            step()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size",
        default=size_name(SIZE[False]),
        help="size of the batch and width of the features, as NxD (default: %(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="run on the CPU to test the program")
    arguments = parser.parse_args()
    (size,) = parse_sizes(arguments.size, "cuda")
    steps(size, None if arguments.dry_run else OURS["cuda"]["fastclip_cuda"], "cpu" if arguments.dry_run else "cuda")


if __name__ == "__main__":
    main()
