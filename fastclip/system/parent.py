"""Termination of a process when its parent ends."""

from __future__ import annotations

import os
import sys
import threading
import time

__all__ = ["end_with_parent"]

_PAUSE = 1.0  # seconds between two checks


def end_with_parent(parent: int | None = None) -> None:
    """End this process about a second after its parent ends, even if the parent was killed with kill -9.

    A thread checks the parent's pid, because the main thread may be blocked in a read or by a full pipe. Linux's
    parent-death signal (prctl) is not used: it is sent as soon as the thread that started this process ends.

    Args:
        parent: pid of the process that forked this one, which may have ended already. None means the current parent.
    """
    if sys.platform == "win32":  # the pid of the parent does not change when the parent ends
        return
    watched = os.getppid() if parent is None else parent
    threading.Thread(target=_watch, args=(watched,), daemon=True, name="parent").start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PAUSE)
    os._exit(1)
