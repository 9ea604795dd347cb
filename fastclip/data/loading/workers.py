"""Processes that read ahead: how they are started, and what is said when one fails, dies or is stuck."""

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

# Micro-batches that workers hold ready at most: each takes three of the files that a process may have open, often
# 1,024.
_READY = 128
_OF_GROUPS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE = 1.0  # seconds in which workers may end by themselves


def load(
    samples: Dataset[Any], pieces: Iterable[Any], watch: Watch, *, ready: int = 1, pin_memory: bool = False
) -> Iterator[Any]:
    """Yield samples[piece] of every piece, in order; the workers that `watch` counts hold about `ready` of them ready.

    Raises:
        OSError, ValueError: as `samples` does, with its message.
        ChildProcessError: a worker was killed or ended by itself.
    """
    forks = watch.workers > 0 and sys.platform == "linux"
    loader: DataLoader[Any] = DataLoader(
        _Worker(samples, watch),
        sampler=pieces,
        batch_size=None,  # a piece is a batch
        collate_fn=_same,
        num_workers=watch.workers,
        prefetch_factor=max(2, ceil_div(min(ready, _READY), watch.workers)) if watch.workers else None,
        # forked workers share the source's memory, and the transform may be any function; Python 3.14 would not fork
        multiprocessing_context="fork" if forks else None,
        worker_init_fn=functools.partial(_begin, os.getpid() if forks else None),
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else it draws from the caller's
    )
    if watch.workers:
        # Workers that make a folder of their own for the sockets through which tensors go leave it behind
        multiprocessing.util.get_temp_dir()
    with ExitStack() as stack:
        with env.tokenizers_without_threads(), _signals_held():
            loaded = iter(loader)  # starts the workers
            stack.enter_context(_ended(loaded))  # a signal that waits is raised at the end of this block
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
    """Return the tensor outside of memory that a worker shares, of which every tensor keeps a file open."""
    return tensor.clone() if tensor.is_shared() else tensor


@contextmanager
def naming_dead_workers() -> Iterator[None]:
    """Turn what torch raises, at any place of the caller, when a worker dies into a ChildProcessError."""
    try:
        yield
    except RuntimeError as error:
        if (death := _death(error)) is None:
            raise
        raise death from error


@contextmanager
def _ended(loaded: Any) -> Iterator[None]:
    """Shut the workers down at the end; terminate those still alive after a second. torch would wait 5 s for each."""
    try:
        yield
    finally:
        # When the interpreter finalizes, multiprocessing has ended the workers already. A thread started then never
        # runs, and before Python 3.12 Thread.start waits for it for ever.
        if (workers := getattr(loaded, "_workers", ())) and not sys.is_finalizing():
            patience = threading.Timer(_PATIENCE, lambda: [worker.terminate() for worker in workers])
            patience.daemon = True
            with suppress(RuntimeError):  # from Python 3.12 on: the interpreter is about to end, and starts no thread
                patience.start()
            with suppress(RuntimeError):  # torch's word for a worker that is ended
                loaded._shutdown_workers()
            patience.cancel()


_END = object()


class _Failure(NamedTuple):
    """An error on its way out of a worker: raised there, DataLoader would bury its message in tracebacks."""

    kind: type[Exception]
    message: str


class _Worker(Dataset[Any]):
    """Answers a list of draws or indices with their batch, or with what failed."""

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
    """Begin a worker, which ends with its parent, and by no signal that is not its own.

    Ctrl-C, and the SIGTERM of torchrun or a scheduler, go to a group of processes: the trainer decides what ends.
    """
    end_with_parent(parent)
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    if hasattr(signal, "sigtimedwait"):
        while signal.sigtimedwait(_OF_GROUPS, 0):  # came before the worker had a group of its own
            pass
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_GROUPS)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM wait; they wait in a process that is started inside, too, until `_begin`.

    An exception that a handler raises while os.fork runs its hooks is printed and lost, and with it what the hook did:
    that of logging releases a lock.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_GROUPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# What torch says, from a signal handler at any place of the parent, or from `next`.
_DEATH = re.compile(r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (?:is killed by signal: (?P<signal>[^.]+)|exited)")


def _death(error: RuntimeError, watch: Watch | None = None, processes: Sequence[Any] = ()) -> ChildProcessError | None:
    """Return the error to raise in place of torch's `error`; None if no worker died."""
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
    hint = {"Killed": ": out of memory? Fewer workers take less", "Bus error": ": is /dev/shm full?"}
    return ChildProcessError(f"{who} {how}{next((text for word, text in hint.items() if word in how), '')}{what}")
