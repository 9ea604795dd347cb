"""Timing, memory, clocks and ceilings of one CUDA GPU."""

from __future__ import annotations

import gc
import math
import statistics
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Step, commit
from benchmarks.losses.peers import describe
from fastclip.bench.provenance import about_gpu
from fastclip.system.machine import nvidia_smi

GEMM_SIZE = 8192  # rows, columns and depth of the large product
COPY_BYTES = 1 << 29  # far larger than any L2
MARK = "spin_kernel"  # part of the name of the kernel that `Gpu.mark` launches


class DeviceLost(RuntimeError):
    """An error on the GPU after which nothing more runs in this process. `args`: the provider and its status."""


class Gpu:
    """The current GPU. `gemm` and `copy` are the two ceilings, measured in every round like the providers."""

    device = "cuda"
    pretended = False
    activity = torch.profiler.ProfilerActivity.CUDA  # a profile shows its events

    def __init__(self, gemm_size: int = GEMM_SIZE, copy_bytes: int = COPY_BYTES) -> None:
        def large(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.bfloat16, device=self.device)

        self._a, self._b, self._product = (large(gemm_size, gemm_size) for _ in range(3))
        self._a.normal_()  # the power of a product depends on its numbers
        self._b.normal_()
        self._source, self._target = large(copy_bytes // 2), large(copy_bytes // 2)
        self.copy_seconds: list[float] = []
        self.gemm_flops = 2.0 * gemm_size**3
        # Memory that the libraries keep after their first calls, forward and backward, must not count for the first
        # provider
        few = torch.ones(64, 64, dtype=torch.bfloat16, device=self.device, requires_grad=True)
        (few @ few).sum().backward()

    def gemm(self) -> None:
        torch.mm(self._a, self._b, out=self._product)

    def copy(self) -> None:
        self._target.copy_(self._source)

    def clock(self, step: Step) -> float:
        """Return the seconds of a step on the GPU. The timed copy before it empties the L2 and lets the host run ahead,
        as the encoders do in training.
        """
        before, start, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda.synchronize()
        before.record()
        self.copy()
        start.record()
        step()
        end.record()
        end.synchronize()
        self.copy_seconds.append(before.elapsed_time(start) / 1e3)
        return start.elapsed_time(end) / 1e3

    def copy_gbs(self) -> float | str:
        """Return the median rate of the copies before the steps, in GB/s of reading and writing."""
        if not self.copy_seconds:
            return ""
        return round(2 * self._source.nbytes / statistics.median(self.copy_seconds) / 1e9, 1)

    def l2_bytes(self) -> int:
        return torch.cuda.get_device_properties(self.device).L2_cache_size

    def sets(self, set_bytes: int) -> int:
        """Return the number of input sets that together take twice the size of the L2."""
        return max(1, math.ceil(2 * self.l2_bytes() / set_bytes))

    def available_bytes(self) -> float:
        """Return the memory that is free, or reserved by torch for new tensors."""
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    def allocated_bytes(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def peak_bytes(self, step: Step) -> int:
        """Return the peak of allocated memory during the step."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def mark(self) -> None:
        """Launch a kernel that does nothing but appears in a profile, to divide the stream's timeline."""
        torch.cuda._sleep(1)

    def replayed(self, step: Callable[[], list[Tensor]], change: Callable[[], None]) -> list[Tensor]:
        """Capture the step in a CUDA graph, and return what its replay computes after `change()` of the inputs."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        change()
        graph.replay()
        out = [x.clone() for x in captured]
        self.synchronize()
        return out

    def attempt(self, name: str, action: Callable[[], Any]) -> str:
        """Run a provider's action, and return an empty status or the failure. Raises DeviceLost."""
        status = ""
        try:
            action()
            self.synchronize()
        except AssertionError as error:
            checked = type(error).__name__ == "CheckFailed"
            status = f"check failed: {error}" if checked else f"error: {describe(error)}"
        except Exception as error:  # kernels of other packages may raise anything
            status = f"error: {describe(error)}"
        if status:
            gc.collect()  # memory that the failed step still holds
            try:
                self.synchronize()
            except Exception as error:
                raise DeviceLost(name, f"device lost: {status}") from error
        return status

    def about(self) -> dict[str, Any]:
        """Return the columns that describe the machine in every row, except clocks and ceilings."""
        return about_gpu(commit())


class Clocks:
    """Median clocks of the SMs and of the memory in MHz, sampled every few hundred milliseconds while this context is
    open.
    """

    def __init__(self, seconds: float = 0.2) -> None:
        self.seconds = seconds
        self.samples: list[tuple[float, float]] = []
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def sm_mhz(self) -> float | str:
        return statistics.median(sm for sm, _ in self.samples) if self.samples else ""

    @property
    def memory_mhz(self) -> float | str:
        return statistics.median(memory for _, memory in self.samples) if self.samples else ""

    def __enter__(self) -> Clocks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.read()
            if self._closed.wait(self.seconds):
                return

    def read(self) -> None:
        """Add a sample, unless it is not a number."""
        try:
            sm, memory = map(float, nvidia_smi("clocks.sm,clocks.mem"))
        except ValueError:
            return
        self.samples.append((sm, memory))
