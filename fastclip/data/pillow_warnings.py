"""Silence for what Pillow warns of, in all threads that read pictures at once."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

__all__ = ["quietly"]

_lock = threading.Lock()
_inside = 0  # threads
_filters = warnings.catch_warnings()  # entered while there are any


@contextmanager
def quietly() -> Iterator[None]:
    """Ignore warnings inside, which would be a line on stderr for each; that a picture is too large is an error.

    Filters of warnings belong to the process, and `warnings.catch_warnings` puts back what it found: of two threads the
    one that leaves last would leave the other's behind. So the first that comes sets them, and the last puts them back.
    """
    global _inside, _filters
    if getattr(sys.flags, "context_aware_warnings", False):  # Python 3.14: a thread's own, where it is asked for
        with warnings.catch_warnings():
            _set()
            yield
        return
    with _lock:
        if not _inside:
            _filters = warnings.catch_warnings()
            _filters.__enter__()
            _set()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _filters.__exit__(None, None, None)
            _inside = max(0, _inside)  # below where this process was forked inside, which put the filters back


def _set() -> None:
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", Image.DecompressionBombWarning)


def _forked() -> None:
    """Put the filters back in a forked process, which has none of the other threads that may be inside."""
    global _inside
    if _inside:
        _inside = 0
        _filters.__exit__(None, None, None)
    _lock.release()


if hasattr(os, "register_at_fork"):  # a thread that holds the lock would never give it back to the child
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_forked)
