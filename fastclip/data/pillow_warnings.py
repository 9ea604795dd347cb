"""Silence Pillow's warnings while several threads read images at the same time."""

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
_inside = 0  # number of threads inside `quietly`
_filters = warnings.catch_warnings()  # entered while at least one thread is inside


@contextmanager
def quietly() -> Iterator[None]:
    """Ignore warnings inside the context, but turn Pillow's warning about an image that is too large into an error.

    The filters of warnings belong to the process, and `warnings.catch_warnings` restores the filters that it saw on
    entry. If each of two threads used it, the one that leaves last could restore the filters that the other had set.
    Therefore the first thread to enter sets the filters, and the last to leave restores them.
    """
    global _inside, _filters
    if getattr(sys.flags, "context_aware_warnings", False):  # from Python 3.14 on, filters may be local to a thread
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
            _inside = max(0, _inside)  # -1 in a process that was forked inside: `_forked` has reset the count to 0


def _set() -> None:
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", Image.DecompressionBombWarning)


def _forked() -> None:
    """Restore the filters in a forked process, in which the threads that were inside do not exist."""
    global _inside
    if _inside:
        _inside = 0
        _filters.__exit__(None, None, None)
    _lock.release()


if hasattr(os, "register_at_fork"):  # a lock that another thread held during the fork would stay locked in the child
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_forked)
