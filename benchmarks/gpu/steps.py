"""Whole steps of the losses compared with their peers, and of the CUDA backend with buffers of other sizes."""

from __future__ import annotations

import functools
import os
import time
from typing import Any, NamedTuple

from torch import Tensor

import fastclip
from benchmarks.gpu.case import GuardedTimings, check_and_measure, measured, own_failures, status_row
from benchmarks.gpu.checklist import LOST, Part, statuses
from benchmarks.gpu.device import DeviceLost
from benchmarks.gpu.log import STEPS, Log
from benchmarks.harness import Case, Provider, Step, append
from benchmarks.losses.cases import size_name
from benchmarks.losses.peers import Unavailable
from benchmarks.losses.providers import OURS, CheckFailed, leaves_of, ours, step_of
from fastclip.parity.truth import blockwise_truth

OPEN_CLIP = ("open_clip", "open_clip_compiled")
SOFTMAX, SIGMOID = (*OPEN_CLIP, "memeff", *OURS["cuda"]), (*OPEN_CLIP, "siglip_kernel", *OURS["cuda"])
PROVIDERS = {"softmax": SOFTMAX, "sigmoid": SIGMOID}


class Planned(NamedTuple):
    """A case and its approximate duration, which includes compilation, the truth, the checks and the rounds."""

    loss: str
    size: tuple[int, int]
    providers: tuple[str, ...]
    seconds: float = 14.0

    @property
    def name(self) -> str:
        peers = "-cut_cross_entropy" if "cut_cross_entropy" in self.providers else ""
        return f"{self.loss}-{size_name(self.size)}{peers}"


CUT = ("open_clip", "cut_cross_entropy", *OURS["cuda"])  # the kernel of cut_cross_entropy first tries many sizes
CASES = {  # in order of worth: the last ones run if earlier parts have left time
    False: [
        *(Planned(loss, (N, 512), PROVIDERS[loss]) for N in (32768, 8192, 1024) for loss in PROVIDERS),
        Planned("softmax", (65536, 768), SOFTMAX, 25.0),
        *(Planned("softmax", (N, 512), SOFTMAX) for N in (2048, 4096, 16384)),
        Planned("softmax", (32768, 512), CUT, 40.0),
    ],
    True: [Planned("softmax", (48, 32), (*SOFTMAX, "cut_cross_entropy")), Planned("sigmoid", (48, 32), SIGMOID)],
}
ROUNDS_SECONDS = {False: 2.5, True: 0.0}

WORKSPACE = {False: [(32768, 512), (65536, 768)], True: [(48, 32)]}
MEGABYTES = (128, 256, 512, 1024, 2048)
VARIABLE = "FASTCLIP_WORKSPACE_MB"


class PeerLost(RuntimeError):
    """A peer broke the GPU for this process; the next process continues without it."""


def one_after_the_other(timings: GuardedTimings, providers: list[Provider], rounds: int) -> None:
    for _ in range(rounds):
        for provider in providers:
            timings.time(provider)


def run(log: Log) -> None:
    """Run the cases of CASES, in `make bench`'s columns and with its checks at the full size, in few rounds. Cases
    without time left, and those after a peer broke the GPU, are skipped and reported.
    """
    todo = [planned for planned in CASES[log.gpu.pretended] if not log.done(planned.name)]
    for k, planned in enumerate(todo):
        if log.left() < planned.seconds and not log.gpu.pretended:
            log.no_time(planned.name)
            continue
        try:
            one_case(log, planned)
        except PeerLost as error:
            for left in todo[k:]:
                log.status(left.name, "", f"left: {error}")
            raise
        log.mark_done(planned.name)


def one_case(log: Log, planned: Planned) -> None:
    case = Case(planned.loss, "both", *planned.size, "bfloat16")
    log.gpu.copy_seconds.clear()
    start = time.monotonic()
    seen = statuses(Part(planned.name, planned.loss, "both", planned.size), log.rows / STEPS)
    broke = {name for name, status in seen.items() if status.startswith(LOST)} - set(OURS["cuda"])
    try:
        new = measured(
            case,
            [name for name in planned.providers if name not in broke],
            log.gpu,
            one_after_the_other,
            ROUNDS_SECONDS[log.gpu.pretended],
        )
    except DeviceLost as error:
        append(log.rows / STEPS, [status_row(case, *error.args)], log.about)
        if error.args[0] in OURS["cuda"]:
            raise CheckFailed(f"{planned.name}: {error.args[0]}: {error.args[1]}") from error
        if error.args[0] not in planned.providers:  # the floor, which cannot be left out
            raise
        raise PeerLost(f"{error.args[0]} broke the GPU in {planned.name}") from error
    append(log.rows / STEPS, new, log.about)
    log.row(planned.name, "", "all of the case", "s", time.monotonic() - start, digits=1)
    if wrong := own_failures(new):
        raise CheckFailed(f"{planned.name}: {'; '.join(wrong)}")


def with_workspace(megabytes: int, backend: str | None, *leaves: Tensor) -> Tensor:
    """Compute the loss with a bound on its buffers, which is read at every call and again in the backward pass."""
    os.environ[VARIABLE] = str(megabytes)
    return fastclip.contrastive_loss(*leaves, normalize=False, backend=backend)


def workspace(log: Log) -> None:
    """Measure milliseconds and peak memory of a step against FASTCLIP_WORKSPACE_MB, interleaved in one process."""
    backend = OURS["cuda"]["fastclip_cuda"]
    try:
        ours(backend, "softmax")
    except Unavailable as reason:
        log.status("", "fastclip_cuda", str(reason))
        return
    before = os.environ.get(VARIABLE)
    try:
        for size in WORKSPACE[log.gpu.pretended]:
            if log.left() < 5:
                log.no_time(f"softmax {size_name(size)}", "fastclip_cuda")
            else:
                one_size(log, size, backend)
    finally:
        os.environ.pop(VARIABLE, None)  # unset if no case had time
        if before is not None:
            os.environ[VARIABLE] = before


def one_size(log: Log, size: tuple[int, int], backend: str | None) -> None:
    case, gpu = Case("softmax", "both", *size, "bfloat16"), log.gpu
    leaves = leaves_of(case, gpu.device)
    expected = blockwise_truth(case.loss, leaves)
    providers, peaks = [], {}
    for megabytes in MEGABYTES:
        loss = functools.partial(with_workspace, megabytes, backend)
        name = f"workspace {megabytes} MiB"
        peaks[name] = check_and_measure(gpu, case, name, loss, leaves, expected)

        def prepare(loss: Any = loss) -> Step:
            return step_of(case, loss, leaves)

        providers.append(Provider(name, prepare))
    timings = GuardedTimings(clock=gpu.clock, attempt=gpu.attempt)
    end, rounds = time.monotonic() + (log.left() - 2) / 2, 0
    while rounds < 3 or (rounds < 15 and time.monotonic() < end and not gpu.pretended):
        one_after_the_other(timings, providers, 1)
        rounds += 1
    for name, seconds in timings.rounds.items():
        text = f"softmax {size_name(size)} {name}"
        log.row(text, "fastclip_cuda", "step", "ms", [1e3 * x for x in seconds])
        log.row(text, "fastclip_cuda", "peak memory", "MiB", peaks[name], digits=1)
    for name, status in timings.status.items():
        log.status(f"softmax {size_name(size)} {name}", "fastclip_cuda", status)
