"""How a command ends: by SIGTERM, as schedulers, containers and ``kill`` end it, or with an error.

An error is one line where the user can mend its cause, and a traceback where we must.
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

_STATUS = 128 + signal.SIGTERM  # 143, as shells give it
_PATIENCE = 8.0  # seconds for tidying up; `docker stop` sends SIGKILL after 10, other schedulers after 30
_OF_USERS = (ValueError, OSError, ImportError, FloatingPointError)
# Of files that are not what they are called, where a library says so in an error of its own. By name: none is loaded.
_OF_FILES = {
    *("zipfile.BadZipFile", "tarfile.TarError", "zlib.error", "lzma.LZMAError", "_lzma.LZMAError", "_csv.Error"),
    *("sqlite3.DatabaseError", "yaml.error.YAMLError", "pickle.UnpicklingError", "_pickle.UnpicklingError"),
    *("safetensors.SafetensorError", "safetensors_rust.SafetensorError", "PIL.Image.DecompressionBombError"),
    "pyarrow.lib.ArrowException",
}
_OF_PROGRAMS = {"sqlite3.ProgrammingError", "sqlite3.InterfaceError"}
_NO_MEMORY = {"builtins.MemoryError", "torch.OutOfMemoryError", "torch.cuda.OutOfMemoryError"}
_LESS = {
    "train": "fewer pairs of --micro-batch at a time take less, as `fastclip plan` tells",
    "finetune": "a smaller --micro-batch takes less",
    "plan": "a smaller model takes less",
    "bench": "a smaller batch takes less",
    "parity": "a smaller --batch takes less",
}


class Terminated(SystemExit):
    """The end of a command to which SIGTERM came; `code` is 143."""

    def __init__(self) -> None:
        super().__init__(_STATUS)


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Have SIGTERM raise `Terminated`, so that files that are half written are removed and children are ended.

    Where an import or a library swallows the exception, it is raised at the end, in place of another one or of none.
    The process ends with status 143 even where that end, or tidying up, takes more than 8 s; a second SIGTERM, a second
    or more after the first, ends it at once.

    A SIGTERM that is ignored when the command starts stays ignored, as does Ctrl-C in a shell's background job: who
    started the command asked for that (``trap '' TERM``), and SIGKILL is left. A handler of the caller stays as well,
    and in another thread than the main one nothing changes.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return
    since: list[float] = []  # when the first came

    def end(number: int, frame: FrameType | None) -> None:
        if not since:
            since.append(time.monotonic())
            with suppress(RuntimeError):  # no thread can be started
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
    finally:  # after a signal the handler stays: the launcher's echo of it must not end the process in another way
        signal.signal(signal.SIGTERM, end if since else signal.SIG_DFL)


def _leave_late() -> NoReturn:
    time.sleep(_PATIENCE)
    os._exit(_STATUS)


def message_of(error: Exception, command: str) -> str | None:
    """Return the line to show; None where the error is a fault of the program, and its traceback helps."""
    kinds = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__]
    first = next(iter(str(error).strip().splitlines()), "")
    if not _NO_MEMORY.isdisjoint(kinds) or (type(error) is RuntimeError and "can't allocate memory" in str(error)):
        where = "the GPU's memory" if "CUDA" in first or "HIP" in first else "memory"
        return f"out of {where}: {_LESS.get(command, 'a smaller --batch-size, or fewer --workers, take less')}"
    if isinstance(error, _OF_USERS):
        return str(error)
    if "http.client.HTTPException" in kinds:
        return f"a server's answer ended early ({type(error).__name__}: {first})"
    if not _OF_FILES.isdisjoint(kinds) and _OF_PROGRAMS.isdisjoint(kinds):
        return f"a file is damaged, or not what it is called ({type(error).__name__}: {first})"
    return None
