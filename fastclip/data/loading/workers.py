"""Start worker processes that read ahead, and report the ones that fail, die or are stuck."""

from __future__ import annotations

import functools
import multiprocessing.util
import os
import random
import re
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastclip.data.loading.watchdog import Alarm, Watch
from fastclip.system import env
from fastclip.system.parent import end_with_parent
from fastclip.system.rounding import ceil_div

__all__ = ["load", "naming_dead_workers", "unshared"]

# The most micro-batches that workers hold ready. Each takes three open files of the calling process (one per tensor),
# and a process may often open only 1,024 files.
_READY = 128
_OF_GROUPS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE = 1.0  # seconds that workers have to end by themselves


def load(
    samples: Dataset[Any], pieces: Iterable[Any], watch: Watch, *, ready: int = 1, pin_memory: bool = False
) -> Iterator[Any]:
    """Yield samples[piece] for every piece, in order, computed by worker processes.

    Args:
        samples: maps a piece, such as a list of indices, to a batch.
        watch: the source, with the number of workers; with 0 workers the calling process reads.
        ready: about how many results the workers prepare ahead.
        pin_memory: put the tensors into pinned memory.

    Raises:
        OSError, ValueError: raised by `samples`, with the same message.
        ChildProcessError: a worker was killed or ended by itself.
    """
    forks = watch.workers > 0 and sys.platform == "linux"
    loader: DataLoader[Any] = DataLoader(
        _Worker(samples, watch),
        sampler=pieces,
        batch_size=None,  # a piece already is a whole batch
        collate_fn=_same,
        num_workers=watch.workers,
        prefetch_factor=max(2, ceil_div(min(ready, _READY), watch.workers)) if watch.workers else None,
        # Forked workers share the source's memory, and the transform need not be picklable. From Python 3.14 on
        # multiprocessing no longer forks by default.
        multiprocessing_context="fork" if forks else None,
        worker_init_fn=functools.partial(_begin, os.getpid() if forks else None),
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else DataLoader draws a seed from the caller's generator
    )
    if watch.workers:
        # The sockets that pass tensors need a folder. It is created in this process, because a folder that a worker
        # creates would not be removed.
        multiprocessing.util.get_temp_dir()
    with ExitStack() as stack:
        with env.tokenizers_without_threads(), _signals_held():
            loaded = iter(loader)  # starts the workers
            # Entered inside this block, because a signal that was held back raises an exception at the block's end.
            stack.enter_context(_ended(loaded))
        alarm = stack.enter_context(Alarm(watch))
        while True:
            try:
                with alarm.waiting():
                    answer = next(loaded, _END)
            except RuntimeError as error:
                if (death := _death(error, watch, getattr(loaded, "_workers", ()))) is None:
                    raise
                raise death from error
            if answer is _END:
                return
            if isinstance(answer, _Failure):
                raise answer.kind(answer.message)
            yield answer


def unshared(tensor: Tensor) -> Tensor:
    """Return the tensor, copied if it is in memory shared with a worker, because such a tensor keeps a file open."""
    return tensor.clone() if tensor.is_shared() else tensor


@contextmanager
def naming_dead_workers() -> Iterator[None]:
    """Turn torch's RuntimeError about a dead worker into a ChildProcessError.

    torch raises it from a signal handler, which means at any place in the code of the caller.
    """
    try:
        yield
    except RuntimeError as error:
        if (death := _death(error)) is None:
            raise
        raise death from error


@contextmanager
def _ended(loaded: Any) -> Iterator[None]:
    """Shut the workers down at the end, and terminate those that are still alive after one second.

    torch alone would wait for 5 s for each worker.
    """
    try:
        yield
    finally:
        # When the interpreter finalizes, multiprocessing has already ended the workers. A thread that is started then
        # never runs, and before Python 3.12 Thread.start would wait for it for ever.
        if (workers := getattr(loaded, "_workers", ())) and not sys.is_finalizing():
            patience = threading.Timer(_PATIENCE, lambda: [worker.terminate() for worker in workers])
            patience.daemon = True
            with suppress(RuntimeError):  # from Python 3.12 on, an interpreter that is about to end starts no thread
                patience.start()
            with suppress(RuntimeError):  # torch raises it for a worker that was terminated
                loaded._shutdown_workers()
            patience.cancel()


_END = object()


class _Failure(NamedTuple):
    """An error of a worker, returned as a value: DataLoader would bury the message of a raised error in tracebacks."""

    kind: type[Exception]
    message: str


class _Worker(Dataset[Any]):
    """Dataset that maps a list of draws or indices to its batch, or to a `_Failure`."""

    def __init__(self, samples: Dataset[Any], watch: Watch) -> None:
        self._samples, self._watch = samples, watch

    def __getitem__(self, piece: Any) -> Any:
        try:
            with _random_states_kept():
                return self._samples[piece]
        except (OSError, ValueError) as error:
            return _Failure(OSError if isinstance(error, OSError) else ValueError, str(error))
        finally:
            self._watch.rest()


@contextmanager
def _random_states_kept() -> Iterator[None]:
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def _same(answer: Any) -> Any:
    return answer


def _begin(parent: int | None, worker: int) -> None:
    """Initialise a worker, so that it ends with its parent and leaves the parent's process group.

    Ctrl-C and the SIGTERM of torchrun or a scheduler reach the whole process group, but the trainer alone decides when
    its workers end.
    """
    end_with_parent(parent)
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    if hasattr(signal, "sigtimedwait"):
        # Drop the signals that were sent before the worker had left the parent's process group.
        while signal.sigtimedwait(_OF_GROUPS, 0):
            pass
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_GROUPS)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back inside the context; a process started inside inherits this until `_begin`.

    If a signal handler raises while os.fork runs its hooks, the exception is printed and lost, and the hook is cut
    short. The hook of `logging` releases a lock, which would then stay locked.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_GROUPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# torch's message about a dead worker, raised from a signal handler at any place in the parent, or by `next`.
_DEATH = re.compile(r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (?:is killed by signal: (?P<signal>[^.]+)|exited)")


def _death(error: RuntimeError, watch: Watch | None = None, processes: Sequence[Any] = ()) -> ChildProcessError | None:
    """Return the error to raise in place of torch's `error`, or None if `error` is not about a dead worker."""
    match = _DEATH.search(str(error))
    if match is None:
        return None
    how = f"was killed by the system ({match['signal']})" if match["signal"] else "ended"
    who, what = "a data worker", ""
    for number, process in enumerate(processes):
        if process.exitcode:  # None: alive
            who = f"data worker {number} (pid {process.pid})"
            what = "" if watch is None else watch.reading(number)
            if process.exitcode < 0:
                how = f"was killed by the system ({signal.strsignal(-process.exitcode)})"
            else:
                how = f"ended with exit status {process.exitcode}"
            break
    hint = {
        "Killed": ", probably for lack of memory: use fewer workers",
        "Bus error": ", probably because /dev/shm is full: enlarge it (docker run --shm-size) or use fewer workers",
    }
    return ChildProcessError(f"{who} {how}{what}{next((text for word, text in hint.items() if word in how), '')}")
