"""Progress of a long computation or a training run: a bar on a terminal, otherwise lines in the log."""

from __future__ import annotations

import logging
import sys
import time

from tqdm import tqdm

__all__ = ["Progress"]

logger = logging.getLogger(__name__)
_PAUSE = 5.0  # seconds between log lines
_BESIDE_BAR = ("loss", "samples_per_second", "data_wait", "mfu")  # a bar has room for these


class Progress:
    """Show a count up to `total` on stderr, if `shown`.

    Args:
        what: description of the items, such as "images of digits".
        done: initial count.
    """

    def __init__(self, what: str, total: int, *, done: int = 0, unit: str = "image", shown: bool = True) -> None:
        self._what, self._total, self._unit, self._shown = what, total, unit, shown
        self._done = self._first = done
        self._begun = time.monotonic()
        self._next_line = 0.0
        bar = shown and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, desc=what, unit=unit, leave=False) if bar else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def count(self, by: int = 1) -> None:
        """Count without logging a line. `show` logs one."""
        self._done += by
        if self._bar is not None:
            self._bar.update(by)

    def moved(self, by: int = 1) -> None:
        """Count, and log a line with the speed if the last line is a few seconds old."""
        self.count(by)
        seconds = time.monotonic() - self._begun
        if seconds >= _PAUSE and self._line_is_due():
            speed = (self._done - self._first) / seconds
            logger.info("%s: %d of %d, %.4g %ss/s", self._what, self._done, self._total, speed, self._unit)

    def show(self, values: dict[str, float]) -> None:
        """Show numbers beside the bar, or in a log line. The first and the last line are written at once."""
        if self._bar is not None:
            self._bar.set_postfix({name: f"{values[name]:.4g}" for name in _BESIDE_BAR if name in values})
        elif self._line_is_due() or (self._shown and self._done == self._total):
            listed = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            logger.info("%s %d of %d: %s", self._unit, self._done, self._total, listed)

    def _line_is_due(self) -> bool:
        if not self._shown or self._bar is not None or time.monotonic() < self._next_line:
            return False
        self._next_line = time.monotonic() + _PAUSE
        return True
