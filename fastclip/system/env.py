"""All environment variables that the package reads.

FASTCLIP_BACKEND       backend of the losses if `backend=` is not given, such as ``cpu`` or ``reference``
FASTCLIP_CACHE         folder for copies of remote shards, for indices that cannot be written beside their shards, for
                       results of interrupted embedding, and for the indices of `fastclip search`
                       (default: ~/.cache/fastclip)
FASTCLIP_CPU_ISA       ``avx512``, ``avx2`` or ``portable`` (default: the best that the processor supports)
FASTCLIP_WORKSPACE_MB  bound on a backend's buffers of logits, in MiB (default: 64 on a CPU, 1024 on a GPU)

A command whose threads outnumber the free cores sets OMP_WAIT_POLICY to PASSIVE, any other sets GOMP_SPINCOUNT to
3000, unless one of the two or KMP_BLOCKTIME is set. TOKENIZERS_PARALLELISM is turned off in the processes that read
data.
RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, set by torchrun, describe a command that runs as several processes.
MASTER_ADDR, MASTER_PORT and TORCHELASTIC_USE_AGENT_STORE locate their rendezvous.
TORCHELASTIC_RUN_ID, SLURM_JOB_ID and SLURM_RESTART_COUNT identify a job that was restarted, perhaps on another host.
TERM, TERM_PROGRAM, KITTY_WINDOW_ID and KONSOLE_VERSION determine how a terminal can show images.
`fastclip doctor` lists those variables of fastclip, Triton, OpenMP and CUDA that are set.
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
    "SLEEPING",
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


WORKSPACE_MB = {"cpu": 64, "cuda": 1024}  # per loss and device type, unless FASTCLIP_WORKSPACE_MB is set
OWN = ("FASTCLIP_BACKEND", "FASTCLIP_CACHE", "FASTCLIP_CPU_ISA", "FASTCLIP_WORKSPACE_MB")
OF_BUILDS = ("FASTCLIP_BUILD_CPU", "FASTCLIP_BUILD_CUDA", "FASTCLIP_CUDA_ARCHS")
# What the commands set if the cores are busy, and if not: the spin bridges the gap between two operations, but is short
# beside a wait for a thread that another program keeps from running
SLEEPING = ("OMP_WAIT_POLICY=PASSIVE", "GOMP_SPINCOUNT=3000")
_SPINNING = ("OMP_WAIT_POLICY", "KMP_BLOCKTIME", "GOMP_SPINCOUNT")
_OF_OTHERS = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TRITON_INTERPRET", *_SPINNING)


def in_effect() -> dict[str, str]:
    """Return the variables that are set and affect the package: all FASTCLIP_*, and some that its libraries read."""
    names = [name for name in sorted(os.environ) if name.startswith("FASTCLIP_") or name in _OF_OTHERS]
    return {name: os.environ[name] for name in names if os.environ[name]}


def backend() -> str | None:
    """Return the name of the backend that FASTCLIP_BACKEND selects, or None."""
    # Every call of a loss runs this. `in` takes a third of the time of `get` for a variable that is not set.
    return (os.environ["FASTCLIP_BACKEND"] or None) if "FASTCLIP_BACKEND" in os.environ else None


def cache_folder() -> Path:
    """Return the folder that FASTCLIP_CACHE names, or the default. It may not exist yet."""
    return Path(os.environ.get("FASTCLIP_CACHE") or "~/.cache/fastclip").expanduser()


def cpu_isa() -> str:
    """Return the instruction set that the CPU kernels must use, or "auto"."""
    return os.environ.get("FASTCLIP_CPU_ISA") or "auto"


def workspace_bytes(device: str = "cpu") -> int:
    """Return the bound on the buffers of logits of a loss, in bytes, for a type of device."""
    if "FASTCLIP_WORKSPACE_MB" not in os.environ:  # `in` is fast, see `backend`
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
    """Position of this process among those that a launcher started. Local processes are those on this machine."""

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int


def launched() -> Launched | None:
    """Return the position of this process among those of its launcher, or None unless RANK and WORLD_SIZE are set.

    Without LOCAL_RANK and LOCAL_WORLD_SIZE, all processes are assumed to run on one machine.
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
    """Return host and port of the store that torchrun hosts, or None if rank 0 hosts the store."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal():
        raise ValueError(
            f"MASTER_ADDR and MASTER_PORT must be the host and port of torchrun (TORCHELASTIC_USE_AGENT_STORE is set), "
            f"got {host!r} and {port!r}"
        )
    return host, int(port)


def job() -> str:
    """Return NAME/START of the job that this process belongs to, or "" without a job.

    START is Slurm's count of restarts. It is empty for torchrun, whose starts of one run never overlap.
    """
    if (run := os.environ.get("TORCHELASTIC_RUN_ID", "")) not in ("", "none"):  # torchrun's default
        return f"torchrun {run}/"
    if number := os.environ.get("SLURM_JOB_ID"):
        return f"slurm {number}/{os.environ.get('SLURM_RESTART_COUNT') or 0}"
    return ""


@contextmanager
def deterministic_cublas() -> Iterator[None]:
    """Make cuBLAS repeat products bit for bit, if its first product runs inside the block. A user's setting is kept."""
    name = "CUBLAS_WORKSPACE_CONFIG"
    with _variable(name, os.environ.get(name, ":4096:8")):
        yield


def let_threads_sleep() -> str:
    """Make OpenMP's threads sleep while they wait, and return NAME=VALUE of the variable that was set, or "".

    A spinning thread may keep the thread it waits for from running. Threads that outnumber the free cores sleep at
    once. All others spin briefly first, because other programs may start later. This has an effect only before torch is
    imported, because torch loads OpenMP. A user's setting is kept.
    """
    if "torch" in sys.modules or any(os.environ.get(name) for name in _SPINNING):
        return ""
    text, process = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip(), launched()
    threads = int(text) if text.isdecimal() else None
    if threads == 1:  # which waits for no other
        return ""
    busy = contended(threads, process.local_ranks if process else 1)
    chosen = SLEEPING[0] if busy else SLEEPING[1]
    name, _, os.environ[name] = chosen.partition("=")
    return chosen


def terminal_protocol() -> str:
    """Return the terminal's image protocol, "kitty" or "iterm", or "" if it is not known to show images."""
    term, program = os.environ.get("TERM", ""), os.environ.get("TERM_PROGRAM", "")
    if term.startswith(("screen", "tmux")):  # the terminal behind screen or tmux is not known
        return ""
    if os.environ.get("KITTY_WINDOW_ID") or term in ("xterm-kitty", "xterm-ghostty") or program == "ghostty":
        return "kitty"
    if program in ("iTerm.app", "WezTerm", "mintty") or os.environ.get("KONSOLE_VERSION", "0") >= "220400":
        return "iterm"
    return ""


@contextmanager
def tokenizers_without_threads() -> Iterator[None]:
    """Make processes that start inside the block use the `tokenizers` library without threads.

    Its threads do not survive a fork. It then warns on stderr, once per process, or waits for them forever if the user
    has enabled them.
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
