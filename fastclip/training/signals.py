"""Signals that end a run after a checkpoint is written."""

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
STATUSES = tuple(128 + number for number in _NUMBERS)  # 143, 130: the exit status that shells report
# Seconds within which a repeated signal counts as the same one: torchrun passes on a signal that its whole process
# group has received, so each process may get it twice
ECHO = 1.0


class Interrupted(SystemExit):
    """Raised when a signal has ended a run and the checkpoint is written. Uncaught, it ends the process with `code`.

    Attributes:
        code: exit status, 143 for SIGTERM and 130 for SIGINT (Ctrl-C).
        steps: updates made.
    """

    def __init__(self, code: int, steps: int) -> None:
        super().__init__(code)
        self.steps = steps


class Signals:
    """Record of the first SIGTERM or SIGINT that this process receives."""

    def __init__(self) -> None:
        self.status = 0  # one of `STATUSES`, or 0 if no signal was received
        self._since = 0.0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Record the first signal inside the context.

        A second signal, if it arrives more than a second after the first, ends the process at once, as if the signal
        were not caught.

        A signal that is already ignored, such as Ctrl-C in a shell's background job, stays ignored. Only the main
        thread can set signal handlers, so nothing is recorded in other threads.
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
                signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: set by C code

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.status:
            self.status, self._since = 128 + number, time.monotonic()
        elif time.monotonic() - self._since > ECHO:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
