"""Parts of everything that needs a GPU, each in its own process, and a record of which are done."""

from __future__ import annotations

import csv
import functools
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.losses.cases import DTYPES, size_name
from fastclip.system.durable import write_text

ROOT = Path(__file__).parents[2]
SECONDS = 570.0  # limit of a part
NO_TESTS = 5  # pytest's exit code
TESTS = {  # pytest's arguments, each for less than SECONDS, ordered by what the others depend on
    "tests-tiles": ("tests/backends/test_cuda.py",),
    "tests-accuracy": ("tests/losses/test_accuracy.py", "tests/losses/test_sigmoid_accuracy.py"),
    "tests-pairs": (
        "tests/backends/test_cuda_plain.py",
        "tests/backends/test_cuda_sigmoid.py",
        "tests/backends/test_plain.py",
        "tests/backends/test_sigmoid_kernels.py",
    ),
    "tests-others": (  # distillation, one direction, margins, labels of the sigmoid loss, hard negatives
        "tests/losses/test_distillation.py",
        "tests/losses/test_direction.py",
        "tests/losses/test_negative_margin.py",
        "tests/losses/test_sigmoid_labels.py",
        "tests/losses/test_hard_negatives.py",
    ),
    "tests-kernels": ("tests/backends/test_kernels.py", "tests/backends/test_triton.py"),
    "tests-gpu": ("tests/backends/test_gpu.py", "-k", "not large and not sanitizer"),
    "tests-gpu-training": (
        "tests/training/test_gpu.py",
        "tests/data/test_pixels.py",
        "tests/evaluation/test_gpu.py",
        "tests/package/test_bench_command.py",
    ),
    "tests-gpu-large": ("tests/backends/test_gpu.py", "-k", "large"),  # its truth takes minutes
    "tests-gpu-sanitizer": ("tests/backends/test_gpu.py", "-k", "sanitizer"),
}
TRAINING = (
    *("--model", "ViT-B-32", "--precision", "bf16", "--batches", "32768/1024", "--rounds", "3"),
    *("--providers", "fastclip,open_clip,open_clip_compiled"),
)
CODE = ("fastclip", "triton_kernels", "csrc", "tests")  # determines the result of the tests
TRANSIENT = ("not installed", "not available")  # statuses of rows that a later run may replace by figures
LOST = "device lost"
# Runs a command, and kills its process group when the requesting process ends in any way. `fastclip.system.parent` ends
# only a Python process, by a thread that an exec would stop, and a parent-death signal reaches only the first process.
GUARD = """
import os, signal, subprocess, sys, threading, time
asking = int(sys.argv[1])
def watch():
    while os.getppid() == asking:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
code = subprocess.call(sys.argv[2:])
sys.exit(code if code >= 0 else 128 - code)
"""


@dataclass(frozen=True)
class Part:
    """Tests, training steps, or (with a loss) a case of the benchmark."""

    name: str
    loss: str = ""
    mode: str = ""
    size: tuple[int, int] = (0, 0)

    def command(self, rows: Path, providers: list[str]) -> list[str]:
        if self.name == "training":
            rows = rows.with_name("training.csv")
            return [sys.executable, "-m", "benchmarks.training", "--device", "cuda", *TRAINING, "--rows", str(rows)]
        pytest = [sys.executable, "-m", "pytest", "-q"]
        if not self.loss:
            return [*pytest, "--full", "-m", "gpu", *TESTS[self.name], "-x"]
        options = ["--device", "cuda", "--sizes", size_name(self.size), "--providers", ",".join(providers)]
        case = ["-k", f"{self.loss} and {self.mode}", "--benchmark-enable", "--benchmark-only"]
        return [*pytest, "benchmarks", *case, *options, "--rows", str(rows)]


def statuses(part: Part, rows: Path) -> dict[str, str]:
    """Map each provider that has a row of this case to its status, "" for figures. The last row counts."""
    if not rows.exists():
        return {}
    with rows.open(newline="") as file:
        case = (part.loss, part.mode, *map(str, part.size), DTYPES["cuda"][0])
        rows_of_case = [
            row for row in csv.DictReader(file) if case == tuple(row[x] for x in ("loss", "mode", "N", "D", "dtype"))
        ]
    return {row["provider"]: row["status"] for row in rows_of_case}


def missing(part: Part, rows: Path, runnable: list[str]) -> list[str]:
    """List the providers of a run of this part: all of them, because rounds are paired, if any lacks a valid row. A
    failure of fastclip is not a valid row, and a peer that broke the GPU is not run again.
    """
    seen = statuses(part, rows)
    count = {name for name, status in seen.items() if not status.startswith(TRANSIENT) and not (status and _own(name))}
    if not set(runnable) - count:
        return []
    return [name for name in runnable if _own(name) or not seen.get(name, "").startswith(LOST)]


def _own(name: str) -> bool:
    return name.startswith("fastclip")


@functools.cache
def runnable(loss: str) -> list[str]:
    """Return the providers that load on this machine. A child process loads them, because some take GPU memory on
    import.
    """
    script = "from benchmarks.losses.providers import load_losses, names; import sys; loss = sys.argv[1]"
    script += "; print('\\n', *load_losses(loss, 'cuda', names(loss, 'cuda'))[0])"
    done = subprocess.run([sys.executable, "-c", script, loss], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the providers of {loss} do not load:\n{done.stderr}")
    return done.stdout.splitlines()[-1].split()


def code_state() -> str:
    """Return a hash of everything in CODE except build products."""
    state = hashlib.sha256()
    for path in sorted(path for folder in CODE for path in (ROOT / folder).rglob("*")):
        if path.is_file() and path.suffix not in (".pyc", ".so"):
            state.update(f"{path.relative_to(ROOT)}\n{path.stat().st_size}\n".encode() + path.read_bytes())
    return state.hexdigest()


def run_limited(command: list[str], seconds: float) -> int | None:
    """Run a command and return its exit code, or None if it took longer than `seconds`. On a timeout, or within a
    second after this process is killed, the command and its child processes are killed.
    """
    guard = [sys.executable, "-I", "-S", "-c", GUARD, str(os.getpid())]
    process = subprocess.Popen([*guard, *command], cwd=ROOT, start_new_session=True)
    try:
        return process.wait(max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@dataclass
class Checklist:
    """Runs parts, and records finished ones: cases by their rows, the tests by a marker."""

    rows: Path
    markers: Path  # a folder with one file per passed test part
    providers: Callable[[str], list[str]] = runnable
    run: Callable[[list[str], float], int | None] = run_limited

    def todo(self, part: Part) -> list[str]:
        """Return what is left of a part: the word `tests`, or providers."""
        if part.loss:
            return missing(part, self.rows, self.providers(part.loss))
        marker = self.markers / part.name
        return [] if marker.exists() and marker.read_text() == code_state() else ["tests"]

    def do(self, part: Part, seconds: float) -> str:
        """Run what is left of a part, and return `done` or the failure. It continues without a provider that broke the
        GPU.
        """
        end = time.monotonic() + seconds
        while todo := self.todo(part):
            before, state = self._lost(part), code_state()
            code = self.run(part.command(self.rows, todo), end - time.monotonic())
            if code is None:
                return f"took more than {seconds:.0f} s"
            if not part.loss and code == 0:
                self.markers.mkdir(parents=True, exist_ok=True)
                write_text(self.markers / part.name, state)
            elif not part.loss and code == NO_TESTS:
                return "no test is marked gpu"
            elif code == 0 and self.todo(part):
                return "left no row for " + ", ".join(self.todo(part))
            elif code and not self._lost(part) - before:
                return f"failed with exit code {code}"
        return "done"

    def _lost(self, part: Part) -> set[str]:
        """Return the peers that broke the GPU."""
        seen = statuses(part, self.rows)
        return {name for name, status in seen.items() if status.startswith(LOST) and not _own(name)}
