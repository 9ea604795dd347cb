"""Time of the host in a step of few rows, which no kernel hides: forward and backward, without waits inside."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.gpu.device import DeviceLost
from benchmarks.gpu.log import Log
from benchmarks.harness import Case
from benchmarks.losses.peers import Loss
from benchmarks.losses.providers import leaves_of, load_losses

N, D = 256, 512
PROVIDERS = ("fastclip_cuda", "fastclip_triton", "open_clip", "open_clip_compiled")
ROUNDS = {False: 200, True: 2}
STEPS = 8  # between two waits for the GPU, which are not timed
MICRO = 1e6


@dataclass
class Host:
    """Microseconds of every step, split into forward and backward."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    @property
    def step(self) -> list[float]:
        return [a + b for a, b in zip(self.forward, self.backward)]

    def time(self, loss: Loss, leaves: tuple[Tensor, ...]) -> None:
        for x in leaves:
            x.grad = None
        start = time.perf_counter()
        value = loss(*leaves)
        middle = time.perf_counter()
        value.backward()
        end = time.perf_counter()
        self.forward.append(MICRO * (middle - start))
        self.backward.append(MICRO * (end - middle))


def run(log: Log) -> None:
    for kind in ("softmax", "sigmoid"):
        one_loss(log, kind, ROUNDS[log.gpu.pretended], log.left() / (2 if kind == "softmax" else 1))


def square(*leaves: Tensor) -> Tensor:
    """Compute the smallest autograd graph: one product of a scalar with itself."""
    return leaves[2] * leaves[2]


def one_loss(log: Log, kind: str, rounds: int, seconds: float) -> None:
    """Run rounds in which every provider takes a turn of a few steps."""
    case, end = Case(kind, "both", N, D, "bfloat16"), time.monotonic() + seconds - 2
    leaves, text = leaves_of(case, log.gpu.device), f"{kind} {N}x{D}"
    losses, status = load_losses(kind, "cuda", PROVIDERS)
    for name, reason in status.items():
        log.status(text, name, reason)
    losses["autograd"] = square
    one = torch.zeros(1, device=log.gpu.device)
    for name in [*losses]:
        if reason := log.gpu.attempt(name, lambda name=name: warm(losses[name], leaves)):
            log.status(text, name, reason)
            del losses[name]
    hosts, launches = {name: Host() for name in losses}, []
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, loss in losses.items():
                for _ in range(STEPS):
                    hosts[name].time(loss, leaves)
                log.gpu.synchronize()
            launches += [launch(one.neg_) for _ in range(STEPS)]
            log.gpu.synchronize()
            if time.monotonic() > end:
                break
    except RuntimeError as error:
        raise DeviceLost("", f"device lost: {error}") from error
    finally:
        gc.enable()
    for name, host in hosts.items():
        for half in ("forward", "backward", "step"):
            log.row(text, name, half, "us", getattr(host, half), digits=2)
    log.row(text, "launch", "step", "us", launches, digits=2)


def warm(loss: Loss, leaves: tuple[Tensor, ...]) -> None:
    for _ in range(3):
        loss(*leaves).backward()


def launch(start: Callable[[], Tensor]) -> float:
    """Return the microseconds of one launch through torch."""
    before = time.perf_counter()
    start()
    return MICRO * (time.perf_counter() - before)
