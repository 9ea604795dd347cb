"""How far a long computation is: a bar on a terminal, else lines in the log."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

__all__ = ["Progress"]

logger = logging.getLogger(__name__)
_PAUSE = 5.0  # seconds between plain lines


class Progress:
    """Counts to `total`, on stderr; silent where it is not `shown`.

    Args:
        what: "images of digits", say.
        done: how many there were before.
    """

    def __init__(self, what: str, total: int, *, done: int = 0, unit: str = "image", shown: bool = True) -> None:
        self._what, self._total, self._unit, self._shown = what, total, unit, shown
        self._done = self._first = done
        self._begun = self._told = time.monotonic()
        bar = shown and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, desc=what, unit=unit, leave=False) if bar else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def moved(self, by: int = 1) -> None:
        self._done += by
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(by)
        elif self._shown and now - self._told >= _PAUSE:
            self._told = now
            speed = (self._done - self._first) / (now - self._begun)
            logger.info("%s: %d of %d, %.4g %ss/s", self._what, self._done, self._total, speed, self._unit)
