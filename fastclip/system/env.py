"""Every environment variable the package reads.

FASTCLIP_BACKEND       backend to use where `backend=` is not given, e.g. ``cpu`` or ``reference``
FASTCLIP_CACHE         folder of copied remote shards, and of indices that cannot lie beside theirs (~/.cache/fastclip)
FASTCLIP_CPU_ISA       ``avx512``, ``avx2`` or ``portable`` in place of the best that the processor runs
FASTCLIP_WORKSPACE_MB  bound on a backend's buffers of logits, in MiB (64 on a CPU, 1024 on a GPU)

OMP_WAIT_POLICY is PASSIVE for a command whose threads outnumber the free cores, unless KMP_BLOCKTIME or GOMP_SPINCOUNT
is set. TOKENIZERS_PARALLELISM is off in the processes that read data.
torchrun's RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE say that a command is one of several processes,
MASTER_ADDR, MASTER_PORT and TORCHELASTIC_USE_AGENT_STORE where they meet.
TORCHELASTIC_RUN_ID, SLURM_JOB_ID and SLURM_RESTART_COUNT say that a command was started again, perhaps on another host.
TERM, TERM_PROGRAM, KITTY_WINDOW_ID and KONSOLE_VERSION say which pictures a terminal shows.
`fastclip doctor` shows those that are set of ours and of Triton's, OpenMP's and CUDA's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from fastclip.system.cores import contended

__all__ = [
    "WORKSPACE_MB",
    "Launched",
    "agent_store",
    "backend",
    "cache_folder",
    "cpu_isa",
    "in_effect",
    "job",
    "launched",
    "let_threads_sleep",
    "terminal_protocol",
    "tokenizers_without_threads",
    "workspace_bytes",
]


WORKSPACE_MB = {"cpu": 64, "cuda": 1024}  # of a loss, by device type, unless FASTCLIP_WORKSPACE_MB says otherwise
OWN = ("FASTCLIP_BACKEND", "FASTCLIP_CACHE", "FASTCLIP_CPU_ISA", "FASTCLIP_WORKSPACE_MB")
OF_BUILDS = ("FASTCLIP_BUILD_CPU", "FASTCLIP_BUILD_CUDA", "FASTCLIP_CUDA_ARCHS")
_SPINNING = ("OMP_WAIT_POLICY", "KMP_BLOCKTIME", "GOMP_SPINCOUNT")
_OF_OTHERS = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TRITON_INTERPRET", *_SPINNING)


def in_effect() -> dict[str, str]:
    """Return variables that are set and change what the package does: all FASTCLIP_*, and some of its libraries'."""
    names = [name for name in sorted(os.environ) if name.startswith("FASTCLIP_") or name in _OF_OTHERS]
    return {name: os.environ[name] for name in names if os.environ[name]}


def backend() -> str | None:
    """Return the name of the backend that the user asks for."""
    # Asked at every call of a loss: a look is a third of the time of a get that finds nothing
    return (os.environ["FASTCLIP_BACKEND"] or None) if "FASTCLIP_BACKEND" in os.environ else None


def cache_folder() -> Path:
    """Return the folder of what is copied and indexed; it may not exist yet."""
    return Path(os.environ.get("FASTCLIP_CACHE") or "~/.cache/fastclip").expanduser()


def cpu_isa() -> str:
    """Return the instruction set that the CPU's kernels are to use."""
    return os.environ.get("FASTCLIP_CPU_ISA") or "auto"


def workspace_bytes(device: str = "cpu") -> int:
    """Return the bound on a loss's buffers of logits on a type of device."""
    if "FASTCLIP_WORKSPACE_MB" not in os.environ:  # as in `backend`
        return WORKSPACE_MB[device] * 2**20
    text = os.environ.get("FASTCLIP_WORKSPACE_MB") or str(WORKSPACE_MB[device])
    try:
        megabytes = float(text)
    except ValueError:
        megabytes = 0.0
    if not 0 < megabytes < 2**20:
        raise ValueError(f"FASTCLIP_WORKSPACE_MB must be a number of MiB above 0, got {text!r}")
    return int(megabytes * 2**20)


class Launched(NamedTuple):
    """A process among those that a launcher has started; local ones are those of this machine."""

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int


def launched() -> Launched | None:
    """Return this process's place among those of its launcher; None unless RANK and WORLD_SIZE are set.

    Without LOCAL_RANK and LOCAL_WORLD_SIZE all processes are taken to be on one machine.
    """
    if not (os.environ.get("RANK") and os.environ.get("WORLD_SIZE")):
        return None
    rank, ranks = _number("RANK"), _number("WORLD_SIZE")
    return Launched(rank, ranks, _number("LOCAL_RANK", rank), _number("LOCAL_WORLD_SIZE", ranks))


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise ValueError(f"{name} must be a number, got {text!r}")
    return int(text)


def agent_store() -> tuple[str, int] | None:
    """Return host and port of the store that torchrun itself keeps; None if rank 0 keeps one."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal():
        raise ValueError(
            f"MASTER_ADDR and MASTER_PORT must be torchrun's host and number (TORCHELASTIC_USE_AGENT_STORE is set), "
            f"got {host!r} and {port!r}"
        )
    return host, int(port)


def job() -> str:
    """Return NAME/START of the job that this process belongs to, empty if there is none.

    Slurm counts the starts of a job. torchrun's starts of one run follow each other, and have no number here.
    """
    if (run := os.environ.get("TORCHELASTIC_RUN_ID", "")) not in ("", "none"):  # torchrun's default
        return f"torchrun {run}/"
    if number := os.environ.get("SLURM_JOB_ID"):
        return f"slurm {number}/{os.environ.get('SLURM_RESTART_COUNT') or 0}"
    return ""


@contextmanager
def deterministic_cublas() -> Iterator[None]:
    """Have cuBLAS, which the first product inside sets up, repeat products bit for bit; a user's value stays."""
    name = "CUBLAS_WORKSPACE_CONFIG"
    with _variable(name, os.environ.get(name, ":4096:8")):
        yield


def let_threads_sleep() -> bool:
    """Make OpenMP's threads sleep while they wait, if they outnumber the free cores. Return True if they do now.

    A thread that spins keeps the one it waits for from running. For a process that has not imported torch, which loads
    OpenMP; a user's own setting stays.
    """
    if "torch" in sys.modules or any(os.environ.get(name) for name in _SPINNING):
        return False
    text, process = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip(), launched()
    if not contended(int(text) if text.isdecimal() else None, process.local_ranks if process else 1):
        return False
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    return True


def terminal_protocol() -> str:
    """Return how the terminal shows pixels: "kitty", "iterm", or "" if it is not known that it does."""
    term, program = os.environ.get("TERM", ""), os.environ.get("TERM_PROGRAM", "")
    if term.startswith(("screen", "tmux")):  # the terminal behind it is not known
        return ""
    if os.environ.get("KITTY_WINDOW_ID") or term in ("xterm-kitty", "xterm-ghostty") or program == "ghostty":
        return "kitty"
    if program in ("iTerm.app", "WezTerm", "mintty") or os.environ.get("KONSOLE_VERSION", "0") >= "220400":
        return "iterm"
    return ""


@contextmanager
def tokenizers_without_threads() -> Iterator[None]:
    """Have processes that start inside use the `tokenizers` library without threads.

    After a fork its threads are gone: it warns on stderr, once a process, or waits for them for ever where the user
    has switched them on.
    """
    with _variable("TOKENIZERS_PARALLELISM", "false"):
        yield


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
