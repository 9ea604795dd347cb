"""How far a long computation or a training run is: a bar on a terminal, else lines in the log."""

from __future__ import annotations

import logging
import sys
import time

from tqdm import tqdm

__all__ = ["Progress"]

logger = logging.getLogger(__name__)
_PAUSE = 5.0  # seconds between plain lines
_BESIDE_BAR = ("loss", "samples_per_second")  # a bar has room for these


class Progress:
    """Count to `total` on stderr, and print nothing unless `shown`.

    Args:
        what: what is counted, such as "images of digits".
        done: the count to begin with.
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
        """Count without a line: `show` writes it."""
        self._done += by
        if self._bar is not None:
            self._bar.update(by)

    def moved(self, by: int = 1) -> None:
        """Count, with a line that gives the speed."""
        self.count(by)
        seconds = time.monotonic() - self._begun
        if seconds >= _PAUSE and self._line_is_due():
            speed = (self._done - self._first) / seconds
            logger.info("%s: %d of %d, %.4g %ss/s", self._what, self._done, self._total, speed, self._unit)

    def show(self, values: dict[str, float]) -> None:
        """Show numbers beside the bar, or in a line; the first line and that of the end come at once."""
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
