"""Children in which a test lets something die."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

import pytest

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="the process that dies is forked")


def forked(work: Callable[[], None]) -> int:
    """The pid of a child in which `work` runs; it ends with status 0 after it, with 1 where it raises."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid
