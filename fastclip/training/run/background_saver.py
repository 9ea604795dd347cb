"""The thread that writes checkpoints while training continues."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

__all__ = ["Saver"]


class Saver:
    """Writer of one checkpoint at a time, in a background thread or in the caller's thread.

        with Saver() as saver:
            saver.wait()  # before taking the next snapshot, so that there are never two in memory
            saver.start(write_snapshot, folder, snapshot)

    Errors of the writing are raised by `wait`, not by `start`, so that a run handles them in the same way in both
    modes and on all ranks at the same step. The ``with`` block ends only when everything is written, even if it ends
    with an error.

    Args:
        background: write in a thread; False writes before `start` returns.
    """

    def __init__(self, *, background: bool = True) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None
        self._writing: Future[Any] | None = None

    def start(self, write: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Wait for the previous write to end, then call ``write(*arguments, **options)``."""
        self.wait()
        if self._pool is None:
            self._writing = Future()
            try:
                self._writing.set_result(write(*arguments, **options))
            except Exception as error:
                self._writing.set_exception(error)
        else:
            self._writing = self._pool.submit(write, *arguments, **options)

    @property
    def failed(self) -> bool:
        """True if the last write has ended with an error. Does not wait for a write in progress."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Wait until nothing is being written, and raise the error of a write that failed since the last call."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            raise failure from error  # the traceback shows both
        finally:
            if self._pool is not None:
                self._pool.shutdown()
