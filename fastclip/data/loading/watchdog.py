"""What each process is reading, so that one that is stuck, or has died, can be named."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.sharedctypes import RawArray
from types import TracebackType
from typing import Any

from torch.utils.data import get_worker_info

from fastclip.data.source import Record, Source, read_sample
from fastclip.data.sources.mixture import Mixture

__all__ = ["Alarm", "Watch"]

logger = logging.getLogger(__name__)
# Of a worker: its pid; the sample it reads, plus 1, or 0; the epoch; since when, in ns of the monotonic clock.
_WORDS = 4


class Watch:
    """A source that notes, in memory which all processes share, what is read from it.

    Args:
        workers: processes that read; 0 is the caller.
        patience: seconds without a batch after which `Alarm` speaks, and after which it speaks again.
    """

    def __init__(self, source: Source, workers: int, patience: float = 60.0) -> None:
        if not patience > 0:
            raise ValueError(f"patience must be above 0, got {patience}")
        self.source, self.workers, self.patience = source, workers, patience
        # without a lock: each worker writes its own words, and nobody may wait for one that is stuck
        self._words: Any = RawArray("q", _WORDS * max(1, workers))

    def read(self, index: int, *, epoch: int = 0, min_side: int | None = None) -> Record:
        """As `fastclip.data.source.read_sample`; of a mixture what `index` is in this epoch."""
        self._note(index + 1, epoch)
        if isinstance(self.source, Mixture):
            return self.source.read(index, epoch=epoch, min_side=min_side)
        return read_sample(self.source, index, min_side=min_side)

    def rest(self) -> None:
        """Note that the reader is done with what it was asked for."""
        self._note(0)

    def _note(self, what: int, epoch: int = 0) -> None:
        info = get_worker_info()
        start = _WORDS * (0 if info is None else info.id)
        self._words[start : start + _WORDS] = [os.getpid(), what, epoch, time.monotonic_ns()]

    def reading(self, worker: int) -> str:
        """Return ``, reading KEY for 61 s``; "" for a worker that rests."""
        _, what, epoch, since = self._words[_WORDS * worker : _WORDS * (worker + 1)]
        if not what:
            return ""
        key = self.source.key(what - 1, epoch=epoch) if isinstance(self.source, Mixture) else self.source.key(what - 1)
        return f", reading {key} for {(time.monotonic_ns() - since) / 1e9:.0f} s"

    def stuck(self) -> str:
        """Return every worker that reads, with its sample."""
        readers = []
        for worker in range(max(1, self.workers)):
            if reading := self.reading(worker):
                pid = self._words[_WORDS * worker]
                readers.append((f"data worker {worker} (pid {pid})" if self.workers else f"pid {pid}") + reading)
        return "; ".join(readers) or "no data worker reads anything"


class Alarm:
    """Says in the log who is stuck when a batch does not come; it ends nothing."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._since: float | None = None  # when the caller began to wait
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Alarm:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def _run(self) -> None:
        patience, last = self._watch.patience, 0.0  # when it last spoke
        while not self._over.wait(patience / 10):
            since, now = self._since, time.monotonic()
            if since is not None and now - max(since, last) >= patience:
                last = now
                logger.error("no batch for %.0f s: %s", now - since, self._watch.stuck())  # seen on every rank
