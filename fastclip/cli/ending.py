"""The end of a command by SIGTERM, which schedulers, containers and ``kill`` send, or by an error.

An error is one line if the user can correct its cause, and a traceback if it is a fault of the program.
"""

from __future__ import annotations

import _thread
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from fastclip.training.signals import ECHO

__all__ = ["Terminated", "message_of", "sigterm_raises"]

_STATUS = 128 + signal.SIGTERM  # 143, the status that shells report
_PATIENCE = 8.0  # seconds for the clean-up; `docker stop` sends SIGKILL after 10 s, Kubernetes and Slurm after 30 s
_OF_USERS = (ValueError, OSError, ImportError, FloatingPointError)
# Errors of libraries for damaged files. They are compared by name, so that no library has to be imported.
_OF_FILES = {
    *("zipfile.BadZipFile", "tarfile.TarError", "zlib.error", "lzma.LZMAError", "_lzma.LZMAError", "_csv.Error"),
    *("sqlite3.DatabaseError", "yaml.error.YAMLError", "pickle.UnpicklingError", "_pickle.UnpicklingError"),
    *("safetensors.SafetensorError", "safetensors_rust.SafetensorError", "PIL.Image.DecompressionBombError"),
    "pyarrow.lib.ArrowException",
}
_OF_PROGRAMS = {"sqlite3.ProgrammingError", "sqlite3.InterfaceError"}
_NO_MEMORY = {"builtins.MemoryError", "torch.OutOfMemoryError", "torch.cuda.OutOfMemoryError"}
_LESS = {
    "train": "lower --micro-batch; `fastclip plan` predicts what fits",
    "finetune": "lower --micro-batch",
    "plan": "choose a smaller model",
    "bench": "lower --sizes",
    "parity": "lower --batch",
}


class Terminated(SystemExit):
    """Raised in a command that receives SIGTERM; `code` is 143."""

    def __init__(self) -> None:
        super().__init__(_STATUS)


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Make SIGTERM raise `Terminated`, so that half-written files are removed and child processes are ended.

    If an import or a library swallows the exception, it is raised again at the end of the block, in place of any other
    exception. The process ends with status 143 even if the rest of the block or the clean-up takes more than 8 s. A
    second SIGTERM ends it at once if it comes a second or more after the first.

    A SIGTERM that is ignored when the command starts stays ignored, because whoever started the command asked for that
    (``trap '' TERM``), as a shell does with Ctrl-C for background jobs; SIGKILL still works. A handler that the caller
    has installed stays as well, and outside the main thread nothing changes.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return
    since: list[float] = []  # time of the first signal

    def end(number: int, frame: FrameType | None) -> None:
        if not since:
            since.append(time.monotonic())
            with suppress(RuntimeError):  # if no thread can be started
                # `threading` takes a lock that the interrupted code may hold
                _thread.start_new_thread(_leave_late, ())
            raise Terminated
        if time.monotonic() - since[0] > ECHO:
            os._exit(_STATUS)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
        if since:
            raise Terminated
    except Exception as error:
        if since:
            raise Terminated from error
        raise
    finally:  # after a signal the handler stays, because the launcher may send the same signal again
        signal.signal(signal.SIGTERM, end if since else signal.SIG_DFL)


def _leave_late() -> NoReturn:
    time.sleep(_PATIENCE)
    os._exit(_STATUS)


def message_of(error: Exception, command: str) -> str | None:
    """Return the line to show, or None if the error is a fault of the program, whose traceback helps."""
    kinds = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__]
    first = next(iter(str(error).strip().splitlines()), "")
    if not _NO_MEMORY.isdisjoint(kinds) or (type(error) is RuntimeError and "can't allocate memory" in str(error)):
        where = "the GPU's memory" if "CUDA" in first or "HIP" in first else "memory"
        return f"out of {where}: {_LESS.get(command, 'lower --batch-size or --workers')}"
    if isinstance(error, _OF_USERS):
        return str(error)
    if "http.client.HTTPException" in kinds:
        return f"a server closed the connection too early: try again ({type(error).__name__}: {first})"
    if not _OF_FILES.isdisjoint(kinds) and _OF_PROGRAMS.isdisjoint(kinds):
        kind = "a file is damaged, or is in a different format from what its name suggests"
        return f"{kind} ({type(error).__name__}: {first})"
    return None
