"""Other builds of the package, or the same build under other settings, timed in the same rounds as this one.

A variant is a process that keeps its features and runs a step for each line on its standard input. Its folder contains
the whole package (Python sources, native modules and `fastclip/triton_kernels`), as created by `pip install --target
FOLDER --no-deps .` in a checkout of another commit. An editable installation of this build would supply missing
modules, so every module reports its origin before any timing.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fastclip
from benchmarks.gpu.device import Gpu
from benchmarks.gpu.log import Log
from benchmarks.gpu.pretended import Pretended
from benchmarks.harness import Case, Step
from benchmarks.losses.cases import size_name
from benchmarks.losses.providers import OURS, CheckFailed, check_one, leaves_of, step_of
from fastclip.parity.truth import blockwise_truth

ROOT = Path(__file__).parents[2]
THIS = "this"
CASES = {
    False: [
        *(("softmax", (N, 512)) for N in (1024, 8192, 32768)),
        *(("sigmoid", (N, 512)) for N in (1024, 8192, 32768)),
        ("softmax", (65536, 768)),
    ],
    True: [("softmax", (48, 32)), ("sigmoid", (48, 32))],
}
ROUNDS = {False: 25, True: 2}
# The variant's fastclip takes precedence; the benchmarks come from this repository
SERVE = """
import sys
folder, root, device, backend = sys.argv[1:]
sys.path.insert(0, folder)
import fastclip
sys.path.insert(0, root)
from benchmarks.gpu.variants import serve
serve(folder, device, backend)
"""


@dataclass(frozen=True)
class Variant:
    """Build of the package in a folder, and settings of its environment."""

    name: str
    folder: Path = ROOT
    environment: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        """Return the text that `parse` reads back, in any working folder."""
        settings = (f"{name}:{value}" for name, value in self.environment)
        return f"{self.name}={next(settings, self.folder)}"


def parse(text: str) -> Variant:
    """Parse `NAME=FOLDER` or `NAME=VARIABLE:VALUE`. Raises ValueError for anything else."""
    name, _, what = text.partition("=")
    if not name or not what or name == THIS:
        raise ValueError(f"{text!r} is neither NAME=FOLDER nor NAME=VARIABLE:VALUE, with a name that is not {THIS!r}")
    if setting := re.fullmatch(r"([A-Z][A-Z0-9_]*):(.*)", what):
        return Variant(name, environment=((setting[1], setting[2]),))
    folder = Path(what).absolute()
    if not (folder / "fastclip" / "__init__.py").is_file():
        raise ValueError(f"{text!r}: there is no package fastclip in {folder}")
    return Variant(name, folder)


class Lost(RuntimeError):
    """A variant's process has ended or does not answer properly."""


@dataclass
class Worker:
    """The process of a variant. It ends with this process, which closes its input."""

    variant: Variant
    device: str
    backend: str  # for the steps; the variant's setting of FASTCLIP_BACKEND takes precedence
    process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        settings = dict(self.variant.environment)
        backend = settings.get("FASTCLIP_BACKEND", self.backend)
        words = [sys.executable, "-c", SERVE, str(self.variant.folder), str(ROOT), self.device, backend]
        environment = {**os.environ, **settings}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(words, env=environment, **pipes)

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise Lost(f"the process ended with exit code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def run(log: Log, variants: list[Variant]) -> None:
    """Run rounds in which every variant takes a step of the same case, this build first."""
    backend = OURS["cuda"]["fastclip_cuda"]
    assert backend is not None  # an automatic choice could differ without a trace in the rows
    workers = [Worker(variant, log.gpu.device, backend) for variant in (Variant(THIS), *variants)]
    try:
        for loss, size in CASES[log.gpu.pretended]:
            if log.left() < 5:
                log.no_time(f"{loss} {size_name(size)}")
            else:
                workers = one_case(log, workers, loss, size)
    finally:
        for worker in workers:
            worker.close()


def one_case(log: Log, workers: list[Worker], loss: str, size: tuple[int, int]) -> list[Worker]:
    """Run a case and return the remaining workers. Raises CheckFailed if this build is wrong; a wrong variant has no
    figures.
    """
    case, alive = f"{loss} {size_name(size)}", [*workers]
    seconds: dict[str, list[float]] = {worker.variant.name: [] for worker in workers}

    def ask(worker: Worker, **question: Any) -> dict[str, Any]:
        """Return the answer. A variant that fails has no figures in this case; one that is lost
        has none in later cases either.
        """
        try:
            answer = worker.ask(**question)
        except Lost as error:
            answer = {"status": f"error: {error}"}
            alive.remove(worker)
        if answer.get("status"):
            del seconds[worker.variant.name]
            log.status(case, worker.variant.name, answer["status"])
        return answer

    for worker in workers:
        status = ask(worker, loss=loss, N=size[0], D=size[1])["status"]
        if worker.variant.name == THIS and status.startswith("check failed"):
            raise CheckFailed(f"{case}: {status}")
    for _ in range(ROUNDS[log.gpu.pretended]):
        for worker in workers:
            name = worker.variant.name
            if name in seconds and not (answer := ask(worker, step=True)).get("status"):
                seconds[name].append(answer["seconds"])
        if log.left() < 3:
            break
    for name, each in seconds.items():
        log.row(case, name, "step", "ms", [1e3 * x for x in each])
        if name != THIS and THIS in seconds:
            log.row(case, name, f"times as fast as {THIS}", "ratio", [b / a for a, b in zip(each, seconds[THIS])])
    return alive


def foreign(folder: Path) -> str:
    """List modules of the package that come, or would come, from another folder; empty if all are in the folder."""
    origins = {
        name: getattr(module, "__file__", None)
        for name, module in sys.modules.items()
        if name == "fastclip" or name.startswith("fastclip.")
    }
    for name in ("fastclip._cuda", "fastclip._cpu", "fastclip.triton_kernels"):  # these may not be loaded yet
        spec = importlib.util.find_spec(name)
        origins[name] = spec.origin if spec else None
    foreigners = [
        f"{name} came from {path}" for name, path in origins.items() if path and folder not in Path(path).parents
    ]
    if not origins["fastclip.triton_kernels"]:
        foreigners.append("there is no fastclip.triton_kernels")
    return ", ".join(sorted(foreigners, key=lambda text: text.count(".")))


def serve(folder: str, device: str, backend: str) -> None:
    """Answer questions on standard input, one line of JSON each: prepare a case, or time a step of it."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # other output must not mix with the answers

    gpu = Gpu() if device == "cuda" else Pretended()
    functions: dict[str, Callable[..., Any]] = {"softmax": fastclip.contrastive_loss, "sigmoid": fastclip.sigmoid_loss}
    prepare: Callable[[], Step]

    def ready(question: dict[str, Any]) -> str:
        nonlocal prepare
        if strangers := foreign(Path(folder)):
            return f"error: not all of {folder}: {strangers}"[:300]
        case = Case(question["loss"], "both", question["N"], question["D"], "bfloat16")
        loss = functools.partial(functions[case.loss], normalize=False, backend=backend)
        leaves = leaves_of(case, gpu.device)
        try:
            check_one(case.loss, loss, leaves, blockwise_truth(case.loss, leaves))
        except CheckFailed as error:
            return f"check failed: {error}"
        prepare = functools.partial(step_of, case, loss, leaves)
        prepare()()
        strangers = foreign(Path(folder))  # modules that a step has loaded
        return f"error: not all of {folder}: {strangers}"[:300] if strangers else ""

    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = {"seconds": gpu.clock(prepare())} if "step" in question else {"status": ready(question)}
        except Exception as error:  # another build may fail in any way
            answer = {"status": f"error: {type(error).__name__}: {error}"[:200]}
        print(json.dumps(answer), file=answers, flush=True)
