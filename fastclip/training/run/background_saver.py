"""The thread that writes checkpoints while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

__all__ = ["Saver"]


class Saver:
    """Writes one checkpoint at a time, in a thread or at once; what fails there is raised by `wait`.

        with Saver() as saver:
            saver.wait()  # before the next snapshot, so that there are never two
            saver.start(write_snapshot, folder, snapshot)

    The block ends when all is written, also where it ends with an error.

    Args:
        background: False writes before `start` returns.
    """

    def __init__(self, *, background: bool = True) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None
        self._writing: Future[Any] | None = None

    def start(self, write: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Call `write`, after the one before has ended."""
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
        """Whether what was written last has failed; does not wait."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Wait until nothing is being written, and raise what failed since the last call."""
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
            raise failure from error  # both are in the traceback
        finally:
            if self._pool is not None:
                self._pool.shutdown()
