"""Profile of the GPU's time in one step of `fastclip train`, by groups of kernels. The groups and
the idle time sum to the step.
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.optim import optimizer as torch_optimizer

from benchmarks.gpu.device import MARK, Gpu
from benchmarks.gpu.log import Log
from benchmarks.training import Case, Shares, Step, ours, pieces_of
from fastclip.models import create_model
from fastclip.training.step.compiled import eager

CASES = {
    False: Case("ViT-B-32", "bf16", 32768, 1024, device="cuda"),
    True: Case("ViT-tiny", "fp32", 6, 2),
}
FEW = 2  # micro-batches of the step before the eager one, which is not profiled
COMPILE_SECONDS = 45.0  # for torch.compile, forward with and without gradients, and a step

# The first pattern in a kernel's lower-case name counts: a fused kernel has the patterns of all that it fuses
PATTERNS = (
    ("loss", r"fastclip"),
    ("pointwise", r"^triton_poi"),
    ("reductions", r"^triton_(red|per)"),
    ("copies from the host", r"memcpy htod"),
    ("copies", r"memcpy|memset|copy_|catarray"),
    ("attention", r"flash|fmha|attention|sdpa"),
    ("optimiser", r"adam|multi_tensor"),
    ("products", r"gemm|nvjet|cublas|cutlass|xmma|splitk|conv(?!ert)|\b(linear|matmul|addmm|b?mm)\b"),
    ("reductions", r"norm|softmax|reduce|gammabeta|\b(sum|mean)\b"),
    ("pointwise", r"elementwise|vectorized|gelu|index|embedding|gather|scatter|\b(add|mul)_?\b"),
)
ORDER = (
    *("products", "attention", "pointwise", "reductions", "copies", "copies from the host"),
    *("optimiser", "loss", "accuracy", "other", "idle"),
)


class Event(NamedTuple):
    """Activity of the GPU, in microseconds."""

    name: str
    start: float
    duration: float

    @property
    def end(self) -> float:
        return self.start + self.duration


class Region(NamedTuple):
    """Interval of the timeline whose kernels belong to one group, whatever their names."""

    group: str
    start: float
    end: float


class Marks(Shares):
    """Marks on the GPU's timeline in place of the loss's clocks: at its beginning and at each of its possible ends."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__("cpu")
        self._of = gpu

    def _now(self) -> float:
        self._of.mark()
        return 0.0


def group_of(name: str, region: str = "") -> str:
    """Return the group of a kernel: that of its region, or one by its name."""
    if region:
        return region
    words = name.lower()
    return next((group for group, pattern in PATTERNS if re.search(pattern, words)), "other")


def regions_of(marks: list[Event]) -> list[Region]:
    """Return the regions between a step's marks: step begin, loss begin and ends, optimiser begin and end, step end."""
    if len(marks) < 6:
        raise RuntimeError(f"the profile has {len(marks)} marks on its timeline, expected at least 6")
    return [
        Region("loss", marks[1].end, marks[-4].start),
        Region("optimiser", marks[-3].end, marks[-2].start),
        Region("accuracy", marks[-2].end, marks[-1].start),
    ]


def groups(events: list[Event]) -> dict[str, float]:
    """Return the microseconds of every group between the first and the last mark. If two kernels overlap, the later one
    counts from the end of the earlier, so that the sum, including idle time, is the step.
    """
    events = sorted(events, key=lambda x: x.start)
    marks = [x for x in events if MARK in x.name]
    regions = regions_of(marks)
    begin, end = marks[0].start, marks[-1].end
    out = dict.fromkeys(ORDER, 0.0)
    covered = begin
    for event in events:
        start, stop = max(event.start, covered), min(event.end, end)
        if MARK in event.name or stop <= start:
            continue
        region = next((x.group for x in regions if x.start <= event.start < x.end), "")
        out[group_of(event.name, region)] += stop - start
        covered = stop
    out["idle"] = end - begin - sum(out.values())
    return out


def events_of(profile: Any, gpu: Gpu) -> list[Event]:
    kind = DeviceType.CPU if gpu.pretended else DeviceType.CUDA
    events = [x for x in profile.events() if x.device_type == kind]
    # marks of the CPU are annotations. A GPU's marks are kernels, and annotations there cover other events
    if not gpu.pretended:
        events = [x for x in events if not getattr(x, "is_user_annotation", False)]
    return [Event(x.name, float(x.time_range.start), float(x.time_range.elapsed_us())) for x in events]


def profiled(step: Step, gpu: Gpu) -> dict[str, float]:
    """Return the groups of one step."""
    hooks = (torch_optimizer.register_optimizer_step_pre_hook, torch_optimizer.register_optimizer_step_post_hook)
    handles = [register(lambda *_: gpu.mark()) for register in hooks]
    try:
        gpu.synchronize()
        with torch.profiler.profile(activities=[gpu.activity]) as profile:
            gpu.mark()
            step()
            gpu.mark()
            gpu.synchronize()
    finally:
        for handle in handles:
            handle.remove()
    return groups(events_of(profile, gpu))


def run(log: Log) -> None:
    case = CASES[log.gpu.pretended]
    torch.manual_seed(0)
    model = create_model(case.model)
    every = pieces_of(case, model)
    pieces = list(every)
    step = ours(case, model, pieces, Marks(log.gpu))
    name = f"{case.model} {case.precision} {case.batch_size}/{case.micro_batch}"
    for mode in ("eager", "compiled"):
        if mode == "compiled" and log.left() < COMPILE_SECONDS and not log.gpu.pretended:
            log.no_time(f"{name} compiled", "fastclip")
            return
        with eager() if mode == "eager" else nullcontext():
            # The step reads this list. A compiled step first has to meet every length of texts
            pieces[:] = every[:FEW] if mode == "eager" else every
            step()
            pieces[:] = every
            by_group = profiled(step, log.gpu)
        log.row(f"{name} {mode}", "fastclip", "step", "ms", sum(by_group.values()) / 1e3, digits=3)
        for group, microseconds in by_group.items():
            log.row(f"{name} {mode}", "fastclip", group, "ms", microseconds / 1e3, digits=3)
