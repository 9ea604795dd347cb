"""Signals that end a run after a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["ECHO", "STATUSES", "Interrupted", "Signals"]

_NUMBERS = (signal.SIGTERM, signal.SIGINT)
STATUSES = tuple(128 + number for number in _NUMBERS)  # 143, 130: a process's exit status, as shells give it
ECHO = 1.0  # seconds in which a signal that comes again is the same one: a launcher passes on what its group got, too


class Interrupted(SystemExit):
    """Raised after a signal ended a run and its checkpoint is written; uncaught, it ends the process with `code`.

    Attributes:
        code: 143 for SIGTERM, 130 for SIGINT (Ctrl-C).
        steps: updates made.
    """

    def __init__(self, code: int, steps: int) -> None:
        super().__init__(code)
        self.steps = steps


class Signals:
    """Notes which of SIGTERM and SIGINT this process has been sent."""

    def __init__(self) -> None:
        self.status = 0  # of `STATUSES`; 0 for none
        self._since = 0.0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note the first signal inside; a second one ends the process at once, as if nothing had caught it.

        A signal that is ignored, as Ctrl-C is in a shell's background job, stays ignored. Handlers are the main
        thread's to set: in another thread nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        heard = [number for number in _NUMBERS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._note) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: set by C

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.status:
            self.status, self._since = 128 + number, time.monotonic()
        elif time.monotonic() - self._since > ECHO:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
