"""The end of a process whose parent has ended."""

from __future__ import annotations

import os
import sys
import threading
import time

__all__ = ["end_with_parent"]

_PAUSE = 1.0  # seconds between two looks


def end_with_parent(parent: int | None = None) -> None:
    """End this process within about a second of its parent's end, however that came: kill -9 leaves no time for more.

    A thread looks who the parent is. A worker may be stuck in a read, or in a pipe that nobody empties, and a
    parent-death signal (Linux's prctl) would come when the thread that started the worker ends.

    Args:
        parent: pid of the process that forked this one, which may have ended already; None: the present parent.
    """
    if sys.platform == "win32":  # the number stays when the process behind it is gone
        return
    watched = os.getppid() if parent is None else parent
    threading.Thread(target=_watch, args=(watched,), daemon=True, name="parent").start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PAUSE)
    os._exit(1)
