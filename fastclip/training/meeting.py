"""Where the processes of a run that torchrun has started, or started again, find each other."""

from __future__ import annotations

import secrets
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

__all__ = ["meeting"]

_c10d: Any = dist
_PAUSE = 0.02  # seconds between looks


def meeting(address: tuple[str, int], rank: int, ranks: int, timeout: timedelta) -> Any:
    """A store that no other start of the run has used, over the one of torchrun's agent at `address` (host, port).

    torchrun keeps one store through its restarts, in which the addresses of dead processes stand (torch 2.14;
    github.com/pytorch/pytorch/issues/135712), and its count of restarts differs between machines. So rank 0 draws a
    name, and the others ask for it with words of their own, which no dead rank 0 has answered.

    Raises:
        ConnectionError: the ranks are not complete within `timeout`.
    """
    store = _c10d.TCPStore(*address, is_master=False, timeout=timeout)
    name = _lead(store, ranks, timeout) if rank == 0 else _follow(store, rank)
    return _c10d.PrefixStore(f"fastclip/{name}", store)


def _lead(store: Any, ranks: int, timeout: timedelta) -> str:
    name, end = secrets.token_hex(8), time.monotonic() + timeout.total_seconds()
    absent = list(range(1, ranks))
    while absent := [rank for rank in absent if not store.check([f"fastclip/{name}/here/{rank}"])]:
        for rank in absent:  # the word may be a dead one's; then another follows
            if store.check([f"fastclip/ask/{rank}"]):
                store.set(f"fastclip/answer/{store.get(f'fastclip/ask/{rank}').decode()}", name)
        if time.monotonic() > end:
            raise ConnectionError(f"no sign of rank {', '.join(map(str, absent))} of {ranks} within the timeout")
        time.sleep(_PAUSE)
    return name


def _follow(store: Any, rank: int) -> str:
    word = secrets.token_hex(8)
    store.set(f"fastclip/ask/{rank}", word)
    name = str(store.get(f"fastclip/answer/{word}").decode())  # waits
    store.set(f"fastclip/{name}/here/{rank}", "")
    return name
