"""Timing of fastclip's losses on every backend, of open_clip and of the dense formula.

Every loss is first checked against the same reference values (`blockwise_truth`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip._backends import backends, pick
from fastclip.bench.harness import Case, Provider, Step, Timings, rows, wall_clock
from fastclip.bench.losses import DENSE, CheckFailed, Loss, check_one, leaves_of, step_of
from fastclip.bench.provenance import about_cpu, about_gpu
from fastclip.losses.contrastive import contrastive_loss
from fastclip.losses.sigmoid import sigmoid_loss
from fastclip.parity.compare import open_clip_loss
from fastclip.parity.truth import blockwise_truth
from fastclip.system.machine import available_bytes

__all__ = ["Measured", "columns", "measure", "table"]

PEER, FORMULA = "open_clip", "dense"
SIZES = {"cpu": (1024, 2048, 4096), "cuda": (8192, 32768, 65536)}
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
_FLUSHED_BYTES = 1 << 28  # larger than any L2 cache


class Measured(NamedTuple):
    """Results for one batch size: rows as in benchmarks/README.md, with a `status` for losses that did not run."""

    case: Case
    rows: list[dict[str, Any]]
    about: dict[str, Any]


def measure(
    *,
    loss: str = "softmax",
    sizes: Sequence[int] | None = None,
    dim: int = 512,
    dtype: str | None = None,
    device: str | None = None,
    rounds: int = 7,
) -> Iterator[Measured]:
    """Time forward and backward together, and yield the results of each batch size as soon as they are complete.

    Args:
        loss: "softmax" or "sigmoid".
        sizes: batch sizes in pairs. None means the defaults of the device.
        dtype: "float32", "bfloat16" or "float16". None means bfloat16 on a GPU, otherwise float32.
        device: "cpu" or "cuda". None means a GPU if there is one.

    Raises:
        ValueError: an option is invalid, or the GPU is missing.
        FloatingPointError: a loss of fastclip differs from the reference values (`blockwise_truth`).
    """
    device = _device(device)
    sizes, dtype = sizes or SIZES[device], dtype or DTYPES[device]
    for name, value in (("--sizes", min(sizes)), ("--D", dim), ("--rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if loss == "softmax" and min(sizes) == 1:
        raise ValueError("--sizes must be at least 2, got 1: the softmax loss of one pair is 0")
    for N in sizes:
        case = Case(loss, "both", N, dim, dtype)
        yield Measured(case, _rows(case, device, rounds), _about(device))


def columns(device: str | None = None) -> list[str]:
    """Return the columns of a CSV file that receives the results of `measure`.

    Raise ValueError if `device` is "cuda" and torch sees no GPU.
    """
    return [*_blank(Case("softmax", "both", 1, 1, "float32")), *_about(_device(device))]


def _device(device: str | None) -> str:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU (see `fastclip doctor`)")
    return device


def _about(device: str) -> dict[str, Any]:
    return about_gpu() if device == "cuda" else about_cpu()


def _blank(case: Case) -> dict[str, Any]:
    """Return a row without figures."""
    (row,) = rows(case, Timings({"": [1.0]}), floor="", peer=PEER, peak_mib={})
    return {**dict.fromkeys(row, ""), **asdict(case), "status": ""}


def _losses(case: Case, device: str) -> dict[str, Loss]:
    """Return the losses by provider: the dense formula, open_clip, and fastclip on each backend for these features."""
    losses: dict[str, Loss] = {FORMULA: DENSE[case.loss]}
    if (peer := open_clip_loss({"softmax": "ClipLoss", "sigmoid": "SigLipLoss"}[case.loss])) is not None:
        losses[PEER] = peer()
    function: Any = {"softmax": contrastive_loss, "sigmoid": sigmoid_loss}[case.loss]
    features = torch.empty(1, case.D, dtype=getattr(torch, case.dtype), device=device)
    for name, state in backends().items():
        # Left out: the reference, which is the dense formula, and Triton's slow interpreter, which is for debugging
        if state != "available" or name == "reference" or (device == "cpu") != (name == "cpu"):
            continue
        try:
            pick(name, features)
        except RuntimeError:
            continue
        losses[f"fastclip_{name}"] = functools.partial(function, normalize=False, backend=name)
    return losses


def _rows(case: Case, device: str, rounds: int) -> list[dict[str, Any]]:
    leaves = leaves_of(case, device)
    expected = blockwise_truth(case.loss, leaves)
    status: dict[str, str] = {}
    peak_mib: dict[str, float] = {}
    providers = []
    for name, loss in _losses(case, device).items():
        if name in (PEER, FORMULA) and case.dense_bytes > _available(device):
            status[name] = f"does not fit: {case.dense_bytes / 2**30:,.1f} GiB"
            continue
        prepare = functools.partial(step_of, case, loss, leaves)
        try:
            check_one(name, loss, leaves, expected)
            if device == "cuda":
                peak_mib[name] = _peak_mib(loss, leaves)
            prepare()()  # warm
        except CheckFailed as error:
            if name.startswith("fastclip"):
                raise FloatingPointError(f"N = {case.N}, {case.dtype}: {error}") from error
            status[name] = f"check failed: {error}"
        except torch.OutOfMemoryError:
            status[name] = "out of memory"
        else:
            providers.append(Provider(name, prepare))
    if not any(provider.name.startswith("fastclip") for provider in providers):
        status["fastclip"] = f"only the reference backend supports {case.dtype} on this device: run fastclip doctor"
    timings = Timings(clock=_gpu_clock() if device == "cuda" else wall_clock)
    for _ in range(rounds):
        for provider in providers:
            timings.time(provider)
    timed = [{**row, "status": ""} for row in rows(case, timings, floor="", peer=PEER, peak_mib=peak_mib)]
    return timed + [{**_blank(case), "provider": name, "status": text} for name, text in status.items()]


def _available(device: str) -> float:
    if device == "cpu":
        return available_bytes()
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # includes memory that torch caches


def _peak_mib(loss: Loss, leaves: tuple[Tensor, ...]) -> float:
    """Return the peak memory of a step on the GPU in MiB, beyond that of features and gradients."""
    for x in leaves:
        x.grad = torch.ones_like(x)  # counted in the baseline
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for x in leaves:
        x.grad = None
    loss(*leaves).backward()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def _gpu_clock() -> Any:
    """Return a clock that times a step between CUDA events, in seconds.

    The copy before the step flushes the L2 cache and lets the host run ahead, as the encoders do in training.
    """
    source, target = (torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))

    def clock(step: Step) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        target.copy_(source)
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return clock


def table(measured: Measured, *, head: bool = True) -> str:
    """Return aligned lines of text. The speed is relative to open_clip or, if that was not timed, the dense formula."""
    by_provider = {row["provider"]: row for row in measured.rows}
    base = next((name for name in (PEER, FORMULA) if by_provider.get(name, {}).get("median_ms")), None)
    lines = [("N", "loss on", "ms", "p20 to p80", f"x {base or PEER}", "peak MiB")] if head else []
    for name, row in by_provider.items():
        if row["status"]:
            cells = ("", row["status"], "", "")
        else:
            ratio = row[f"speedup_over_{PEER}"] or (by_provider[base]["median_ms"] / row["median_ms"] if base else None)
            times = f"{ratio:.2f}" if ratio else ""
            peak = f"{row['peak_mib']:,.0f}" if row["peak_mib"] != "" else ""
            cells = (f"{row['median_ms']:,.2f}", f"{row['p20_ms']:,.2f} to {row['p80_ms']:,.2f}", times, peak)
        lines.append((f"{measured.case.N:,}", name, *cells))
    widths = (7, 17, 11, 21, 12) + ((9,) if "gpu" in measured.about else ())  # peak memory is not measured on a CPU
    return "\n".join(
        "  ".join(
            cell.ljust(width) if k == 1 else cell.rjust(width) for k, (cell, width) in enumerate(zip(line, widths))
        )
        for line in lines
    ).rstrip()
