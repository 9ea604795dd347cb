"""Children of tests: programs that are started and processes that are forked. None outlives its test.

Signals do to a child what they do to a program that is started at a terminal, whatever pytest inherited: where a script
runs it in the background, Ctrl-C (SIGINT) is ignored, by it and by all that it starts.
"""

from __future__ import annotations

import contextlib
import ctypes
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
# Takes the pid of a program that it becomes
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
    """A program as subprocess.Popen, with pipes of text, in a session of its own; `ignored` are signals it ignores."""
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, " ".join(number.name for number in ignored)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process: Popen = subprocess.Popen([*launcher, *map(str, words)], start_new_session=True, **{**pipes, **options})
    _children[process.pid] = process
    return process


def forked(work: Callable[[], object], said: Path | None = None, **environment: str) -> int:
    """The pid of a child that runs `work`, in a session of its own.

    Its status is 0, 1 where `work` raises, with its words in `said`, or that of a SystemExit.
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
    """The exit status of a child of `forked`, or less than 0: the signal that ended it."""
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
    """Processes that are left of a session, and not dead; none is seen where there is no /proc."""
    return [str(process) for process in _processes() if process.session == session]


def gloo_threads() -> int:
    """Threads of this process that belong to a gloo group; none is seen where there is no /proc."""
    names = [Path(path, "comm").read_text().strip() for path in glob.glob("/proc/self/task/*")]
    return names.count("pt_gloo_runloop")


def end_children() -> None:
    """End what is left of the programs and forks of a test, with all that they started."""
    while _children:
        pid, process = _children.popitem()
        for left in [found.pid for found in _processes() if found.session == pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
        if process is None:
            with contextlib.suppress(ChildProcessError):  # the test has seen its end
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
    """From here on a process whose parent dies is a child of this one, for `left_behind` to see."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_ADOPTS, 1, 0, 0, 0)


def left_behind(seconds: float = 20) -> list[str]:
    """Processes below this one that do not end within a time; they are killed. None is seen where there is no /proc."""
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
    """Those that are not dead."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has ended meanwhile
            continue
        if state not in "ZX":
            found.append(_Process(int(stat.parent.name), int(parent), int(session)))
    return found


# One a process that multiprocessing, or torch.compile, keeps until its end
_KEPT = ("multiprocessing.resource_tracker", "multiprocessing.forkserver", "torch/_inductor/compile_worker")


def _below(pid: int) -> list[_Process]:
    found, parents, processes = [], {pid}, _processes()
    while parents:
        children = [one for one in processes if one.parent in parents and not any(kept in str(one) for kept in _KEPT)]
        found += children
        parents = {child.pid for child in children}
    return found


def _heed() -> None:
    """In a child that was forked."""
    for number in map(signal.Signals.__getitem__, _HEEDED):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
