"""Children of tests: programs that are started and processes that are forked. None outlives its test.

Signals act on a child as on a program started at a terminal, whatever pytest inherited. A script that runs pytest in
the background makes it, and all processes that it starts, ignore Ctrl-C (SIGINT).
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import glob
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="the process that dies is forked")

Popen = subprocess.Popen[str]
_HEEDED = ("SIGINT", "SIGTERM", "SIGQUIT", "SIGHUP")
_DIES_WITH_PARENT, _ADOPTS = 1, 36  # PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER of Linux
_children: dict[int, Popen | None] = {}  # by pid; each leads a session
# A program that prepares the process and then replaces itself by the command
_LAUNCHER = f"""
import ctypes, os, signal, sys
for number in map(signal.Signals.__getitem__, {_HEEDED}):
    signal.signal(number, signal.SIG_IGN if number.name in sys.argv[1].split() else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
if sys.platform == "linux":
    ctypes.CDLL(None).prctl({_DIES_WITH_PARENT}, signal.SIGKILL)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def start(words: Sequence[str | Path], *, ignored: Collection[signal.Signals] = (), **options: Any) -> Popen:
    """Start a program with subprocess.Popen in a new session, with text pipes; it ignores the signals in `ignored`."""
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, " ".join(number.name for number in ignored)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process: Popen = subprocess.Popen([*launcher, *map(str, words)], start_new_session=True, **{**pipes, **options})
    _children[process.pid] = process
    return process


def forked(work: Callable[[], object], said: Path | None = None, **environment: str) -> int:
    """Fork a child that runs `work` in a new session, and return its pid.

    The exit status is 0, or 1 if `work` raises (with the message in `said`), or that of a SystemExit.
    """
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setsid()
            _heed()
            os.environ.update(environment)
            work()
            status = 0
        except SystemExit as leaving:
            status = int(leaving.code or 0)
        except BaseException as error:
            traceback.print_exc()
            if said is not None:
                said.write_text(f"{type(error).__name__}: {error}")
        finally:
            os._exit(status)
    _children[pid] = None
    return pid


def ended(pid: int, seconds: float = 300) -> int:
    """Return the exit status of a child of `forked`, or the negative number of the signal that ended it."""
    end = time.monotonic() + seconds
    while not (found := os.waitpid(pid, os.WNOHANG))[0]:
        assert time.monotonic() < end, f"process {pid} does not end"
        time.sleep(0.002)
    if not in_session(pid):
        _children.pop(pid, None)
    return os.waitstatus_to_exitcode(found[1])


def wait_for(is_so: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.002)


def in_session(session: int) -> list[str]:
    """List the living processes of a session, none on systems without /proc."""
    return [str(process) for process in _processes() if process.session == session]


def join_group(rank: int, ranks: int, folder: str | Path, seconds: float = 1800) -> None:
    """Join a gloo group of `ranks` processes, which meet in `folder` and wait at most `seconds` for each other.

    Its threads end with `destroy_process_group`, so that none of them aborts the process at its exit.
    """
    import torch.distributed as dist

    from fastclip.distributed import before_group

    before_group()
    where, limit = f"file://{folder}/meet", datetime.timedelta(seconds=seconds)
    dist.init_process_group("gloo", where, rank=rank, world_size=ranks, timeout=limit)


def gloo_threads() -> int:
    """Count the threads of this process that belong to a gloo group, 0 on systems without /proc."""
    names = [Path(path, "comm").read_text().strip() for path in glob.glob("/proc/self/task/*")]
    return names.count("pt_gloo_runloop")


def end_children() -> None:
    """Kill the remaining programs and forks of a test, with all processes that they started."""
    while _children:
        pid, process = _children.popitem()
        for left in [found.pid for found in _processes() if found.session == pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
        if process is None:
            with contextlib.suppress(ChildProcessError):  # the test has waited for it
                if not os.waitpid(pid, os.WNOHANG)[0]:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
        else:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()


def adopt() -> None:
    """Make this process the new parent of all descendants whose parents die, so that `left_behind` sees them."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_ADOPTS, 1, 0, 0, 0)


def left_behind(seconds: float = 20) -> list[str]:
    """Return descendants that do not end within `seconds`, after killing them; none on systems without /proc."""
    end = time.monotonic() + seconds
    while (left := _below(os.getpid())) and time.monotonic() < end:
        time.sleep(0.05)
    told = [str(process) for process in left]
    for process in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    return told


class _Process(NamedTuple):
    pid: int
    parent: int
    session: int

    def __str__(self) -> str:
        try:
            words = Path(f"/proc/{self.pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            words = [b"ended"]
        return f"{self.pid}: {b' '.join(words).decode(errors='replace')}"


def _processes() -> list[_Process]:
    """Return all processes that are not dead."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # ended in the meantime
            continue
        if state not in "ZX":
            found.append(_Process(int(stat.parent.name), int(parent), int(session)))
    return found


# processes that multiprocessing, or torch.compile, keeps until its end, one each
_KEPT = ("multiprocessing.resource_tracker", "multiprocessing.forkserver", "torch/_inductor/compile_worker")


def _below(pid: int) -> list[_Process]:
    found, parents, processes = [], {pid}, _processes()
    while parents:
        children = [one for one in processes if one.parent in parents and not any(kept in str(one) for kept in _KEPT)]
        found += children
        parents = {child.pid for child in children}
    return found


def _heed() -> None:
    """Reset signals to their defaults in a forked child, which also dies with its parent."""
    for number in map(signal.Signals.__getitem__, _HEEDED):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
