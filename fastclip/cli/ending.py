"""SIGTERM, with which schedulers, containers and ``kill`` end a command."""

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

__all__ = ["Terminated", "sigterm_raises"]

_STATUS = 128 + signal.SIGTERM  # 143, as shells give it
_PATIENCE = 8.0  # seconds for tidying up; `docker stop` sends SIGKILL after 10, other schedulers after 30


class Terminated(SystemExit):
    """SIGTERM came; `code` is 143."""

    def __init__(self) -> None:
        super().__init__(_STATUS)


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated`, so that files that are half written are removed and children are ended.

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
