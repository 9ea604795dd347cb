"""Track the sample that each worker process is reading, so that a stuck or killed worker can be named."""

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
# Words per worker: its pid; the index of the sample that it is reading plus 1, or 0 if it is idle; the epoch of the
# sample; the time at which reading began, in ns of the monotonic clock.
_WORDS = 4


class Watch:
    """A source, with a record in shared memory of the sample that each worker is reading.

    Args:
        workers: number of processes that read. With 0 the calling process reads.
        patience: seconds without a batch after which `Alarm` logs an error. The error is repeated at this interval.
    """

    def __init__(self, source: Source, workers: int, patience: float = 60.0) -> None:
        if not patience > 0:
            raise ValueError(f"patience must be above 0, got {patience}")
        self.source, self.workers, self.patience = source, workers, patience
        # Without a lock: no two workers write the same words, and a process must never wait for a stuck worker.
        self._words: Any = RawArray("q", _WORDS * max(1, workers))

    def read(self, index: int, *, epoch: int = 0, min_side: int | None = None) -> Record:
        """Return sample `index` (in a mixture, of the given epoch); see `fastclip.data.source.read_sample`."""
        self._note(index + 1, epoch)
        if isinstance(self.source, Mixture):
            return self.source.read(index, epoch=epoch, min_side=min_side)
        return read_sample(self.source, index, min_side=min_side)

    def rest(self) -> None:
        """Record that the calling worker has finished reading its piece."""
        self._note(0)

    def _note(self, what: int, epoch: int = 0) -> None:
        info = get_worker_info()
        start = _WORDS * (0 if info is None else info.id)
        self._words[start : start + _WORDS] = [os.getpid(), what, epoch, time.monotonic_ns()]

    def reading(self, worker: int) -> str:
        """Return ``, reading KEY for 61 s``, or "" if the worker is idle."""
        _, what, epoch, since = self._words[_WORDS * worker : _WORDS * (worker + 1)]
        if not what:
            return ""
        key = self.source.key(what - 1, epoch=epoch) if isinstance(self.source, Mixture) else self.source.key(what - 1)
        return f", reading {key} for {(time.monotonic_ns() - since) / 1e9:.0f} s"

    def stuck(self) -> str:
        """Return a text that lists every worker that is reading, with its sample and the time."""
        readers = []
        for worker in range(max(1, self.workers)):
            if reading := self.reading(worker):
                pid = self._words[_WORDS * worker]
                readers.append((f"data worker {worker} (pid {pid})" if self.workers else f"pid {pid}") + reading)
        return "; ".join(readers) or "no data worker is reading"


class Alarm:
    """A thread that logs which workers are reading when a batch does not arrive. The alarm ends no process."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._since: float | None = None  # the time at which the caller began to wait; None while it does not
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
        patience, last = self._watch.patience, 0.0  # `last`: the time of the last log line
        while not self._over.wait(patience / 10):
            since, now = self._since, time.monotonic()
            if since is not None and now - max(since, last) >= patience:
                last = now
                # An error, because the log of every rank shows errors and the stuck worker may belong to any rank.
                logger.error("no batch for %.0f s: %s", now - since, self._watch.stuck())
