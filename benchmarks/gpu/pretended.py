"""The CPU in the role of a GPU, for dry runs and tests of code that needs a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.device import MARK, Gpu
from benchmarks.harness import Step, commit, wall_clock
from fastclip.bench.provenance import about_cpu
from fastclip.system.installed import installed_version

DRY_RUN = "dry run"  # replaces the GPU's name, so that no row can be taken for a result


class Pretended(Gpu):
    """The CPU as a GPU with the given memory and an L2 cache of `l2` bytes."""

    device = "cpu"
    pretended = True
    activity = torch.profiler.ProfilerActivity.CPU
    lost = False

    def __init__(self, memory: float = 1e9, l2: int = 1) -> None:
        super().__init__(gemm_size=16, copy_bytes=64)
        self.memory, self.l2 = memory, l2

    def clock(self, step: Step) -> float:
        self.copy_seconds.append(wall_clock(self.copy))
        return wall_clock(step)

    def l2_bytes(self) -> int:
        return self.l2

    def available_bytes(self) -> float:
        return self.memory

    def allocated_bytes(self) -> int:
        return 2**20

    def peak_bytes(self, step: Step) -> int:
        step()
        return 3 * 2**20

    def synchronize(self) -> None:
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def mark(self) -> None:
        with torch.profiler.record_function(MARK):
            pass

    def replayed(self, step: Callable[[], list[Tensor]], change: Callable[[], None]) -> list[Tensor]:
        step()
        change()
        return step()

    def about(self) -> dict[str, Any]:
        """Return the columns of a GPU's rows."""
        of_cpu = about_cpu(commit())
        of_gpu = {"gpu": DRY_RUN, "driver": "", "cuda": "", "triton": installed_version("triton")}
        columns = ["date", "commit", "gpu", "driver", "cuda", "python", "torch", "triton", "fastclip", "open_clip"]
        return {name: {**of_cpu, **of_gpu}[name] for name in columns}
