"""Counts of what a rank sends, receives and multiplies, by wrappers of torch.distributed's calls and torch's products.

Bytes are those that cannot be avoided, however a backend implements a call. Of W ranks, all_gather sends a rank's shard
to each of the others, (W - 1) shards (as a ring algorithm also does). reduce_scatter, all_to_all and scatter send (W -
1) / W of their input, and all_reduce 2 (W - 1) / W of it. Messages between two ranks count with their size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Counts", "counted"]


@dataclass
class Counts:
    """Counts of one rank: bytes, communicating calls, and operations of matrix products, 2 M N K each."""

    sent: float = 0
    received: float = 0
    calls: int = 0
    operations: int = 0


Bytes = tuple[float, float]  # sent, received


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _all_gather(group: Any, out: Any, x: Tensor, *_: Any) -> Bytes:
    others = (dist.get_world_size(group) - 1) * _bytes(x)
    return others, others


def _reduce_scatter(group: Any, out: Tensor, x: Any, *_: Any) -> Bytes:
    others = (dist.get_world_size(group) - 1) * _bytes(out)
    return others, others


def _all_to_all_single(group: Any, out: Tensor, x: Tensor, out_rows: Any = None, in_rows: Any = None) -> Bytes:
    W, rank = dist.get_world_size(group), dist.get_rank(group)

    def to_others(y: Tensor, rows: Sequence[int] | None) -> float:
        shard = len(y) / W if rows is None else rows[rank]
        return _bytes(y) * (1 - shard / len(y)) if len(y) else 0

    return to_others(x, in_rows), to_others(out, out_rows)


def _all_to_all(group: Any, out: list[Tensor], x: list[Tensor], *_: Any) -> Bytes:
    rank = dist.get_rank(group)
    sent, received = (sum(_bytes(y) for k, y in enumerate(shards) if k != rank) for shards in (x, out))
    return sent, received


def _all_reduce(group: Any, x: Tensor, *_: Any) -> Bytes:
    W = dist.get_world_size(group)
    return 2 * (W - 1) / W * _bytes(x), 2 * (W - 1) / W * _bytes(x)


def _scatter(group: Any, out: Tensor, shards: list[Tensor] | None = None, src: int = 0, *_: Any) -> Bytes:
    if dist.get_rank() == src:
        assert shards is not None
        return (len(shards) - 1) * _bytes(out), 0
    return 0, _bytes(out)


def _batch(group: Any, operations: list[Any]) -> Bytes:
    sent = sum(_bytes(one.tensor) for one in operations if one.op is dist.isend)
    return sent, sum(_bytes(one.tensor) for one in operations) - sent


def _never(group: Any, *_: Any) -> Bytes:
    raise NotImplementedError("this call of torch.distributed cannot be counted yet")


_CALLS: dict[str, Callable[..., Bytes]] = {
    "all_gather": _all_gather,
    "all_gather_into_tensor": _all_gather,
    "all_gather_single": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "reduce_scatter_tensor": _reduce_scatter,
    "reduce_scatter_single": _reduce_scatter,
    "all_to_all_single": _all_to_all_single,
    "all_to_all": _all_to_all,
    "all_reduce": _all_reduce,
    "scatter": _scatter,
    "batch_isend_irecv": _batch,
    **dict.fromkeys(("broadcast", "gather", "reduce", "send", "recv"), _never),
}
_CALLERS = ("fastclip.", "inf_cl", "open_clip.loss")  # modules that may hold a call under another name


class _Products(TorchDispatchMode):
    """A mode that counts products of autograd and plain torch, but does not see those inside custom ops."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts, self.off = counts, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if not self.off and func in (aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default):
            a, b = args[-2:]
            self.counts.operations += 2 * a.numel() * b.shape[-1]
        return func(*args, **(kwargs or {}))

    def wrap(self, real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Wrap torch.mm or torch.addmm, which custom ops call."""

        def wrapped(*args: Any, **kwargs: Any) -> Tensor:
            a, b = args[-2:]
            self.counts.operations += 2 * a.numel() * b.shape[-1]
            self.off = True
            try:
                return real(*args, **kwargs)
            finally:
                self.off = False

        return wrapped


def _counting(counts: Counts, real: Callable[..., Any], cost: Callable[..., Bytes]) -> Callable[..., Any]:
    def wrapped(*args: Any, group: Any = None, **kwargs: Any) -> Any:
        sent, received = cost(group, *args)
        counts.sent += sent
        counts.received += received
        counts.calls += 1
        if cost is not _batch:
            kwargs["group"] = group
        return real(*args, **kwargs)

    return wrapped


@contextmanager
def counted() -> Iterator[Counts]:
    """Count everything that this rank does inside the context."""
    counts = Counts()
    products = _Products(counts)
    wrapped = {getattr(dist, name): cost for name, cost in _CALLS.items() if hasattr(dist, name)}
    replaced: list[tuple[Any, str, Any]] = [(torch, name, getattr(torch, name)) for name in ("mm", "addmm")]
    modules = [dist, *(module for name, module in sys.modules.items() if name.startswith(_CALLERS))]
    for module in modules:
        for name, value in vars(module).items():
            if callable(value) and getattr(value, "__hash__", None) and value in wrapped:
                replaced.append((module, name, value))
    try:
        for module, name, real in replaced:
            new = products.wrap(real) if module is torch else _counting(counts, real, wrapped[real])
            setattr(module, name, new)
        with products:
            yield counts
    finally:
        for module, name, real in replaced:
            setattr(module, name, real)
