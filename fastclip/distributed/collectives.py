"""The collectives of the sharded losses as torch ops, differentiable any number of times.

`sizes` is the number of rows on every rank. The backward of each op is the adjoint collective, because gradients are
those of the sum of all ranks' losses.

Ranks hang if they issue collectives in different orders. A compiler may reorder operations that do not depend on each
other, and may do so on one rank only. Therefore each collective takes the result of the one before it as an input,
`after`, which fixes their order in the forward and in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastclip.ops.backward import TAGS

__all__ = ["all_gather", "before_group", "exchange_columns", "gather_rows", "resolve", "sum_over_ranks"]


def before_group() -> None:
    """Import torch.distributed.nn, which must happen before `init_process_group` is called.

    The functions of torch.distributed.nn have the default group as a default argument, which is evaluated at import. If
    the first import follows the creation of the group, this argument keeps the group alive for ever. Later code causes
    such an import: DistributedDataParallel, functional collectives and open_clip's losses. gloo's threads live as long
    as their group, and threads that still run when the interpreter exits abort the process in about one of every few
    dozen runs.
    """
    if dist.is_available():
        import torch.distributed.nn  # noqa: F401  the import takes about 30 ms


def resolve(group: str) -> Any:
    """Return the process group of this name."""
    c10d: Any = dist.distributed_c10d
    return c10d._resolve_process_group(group)


def _named(*names: str) -> Callable[..., Any]:
    """Return the first of these functions that torch has: newer versions renamed some and warn about the old names."""

    def none(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"torch.distributed has no function {' or '.join(names)}: upgrade torch")

    return next((getattr(dist, name) for name in names if hasattr(dist, name)), none)


all_gather = _named("all_gather_single", "all_gather_into_tensor")
_reduce_scatter = _named("reduce_scatter_single", "reduce_scatter_tensor")


def _padded(x: Tensor, rows: int) -> Tensor:
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, rows - len(x))) if len(x) < rows else x.contiguous()


def _gather(x: Tensor, sizes: Sequence[int], group: str, after: Tensor | None = None) -> Tensor:
    """Gather (sizes[rank], ...) -> (sum(sizes), ...).

    Every rank sends as many rows as the largest shard has, because an all-gather into one tensor needs equal sizes.
    """
    largest = max(sizes)
    out = x.new_empty(len(sizes) * largest, *x.shape[1:])
    all_gather(out, _padded(x, largest), group=resolve(group))
    if min(sizes) == largest:
        return out
    return torch.cat([shard[:size] for shard, size in zip(out.split(largest), sizes)])


def _adds_on_the_way(pg: Any, x: Tensor) -> bool:
    return x.device.type != "cpu" and dist.get_backend(pg) != "gloo"


def _reduce(x: Tensor, sizes: Sequence[int], group: str) -> Tensor:
    """Sum (sum(sizes), ...) over the ranks, and return the rows of this rank, (sizes[rank], ...).

    NCCL adds the shares while it sends them. They are first converted to fp32, because a 16-bit sum would be rounded at
    every rank: over a thousand ranks, the sum would grow so large that rounding removes most of the later shares. With
    gloo every rank sends its shares to their owner, which sums them in rank order, in fp32.
    """
    pg = resolve(group)
    size, largest = sizes[dist.get_rank(pg)], max(sizes)
    wide = torch.promote_types(x.dtype, torch.float32)
    if _adds_on_the_way(pg, x):
        if min(sizes) < largest:
            x = torch.cat([_padded(shard, largest) for shard in x.split(list(sizes))])
        out = x.new_empty(largest, *x.shape[1:], dtype=wide)
        _reduce_scatter(out, x.to(wide).contiguous(), group=pg)
        return out[:size].to(x.dtype, copy=True)
    shares = x.new_empty(len(sizes) * size, *x.shape[1:])
    dist.all_to_all_single(shares, x.contiguous(), [size] * len(sizes), list(sizes), group=pg)
    return shares.view(len(sizes), size, *x.shape[1:]).sum(0, dtype=wide).to(x.dtype)


def _exchange(x: Tensor, sizes: Sequence[int], group: str) -> Tensor:
    """Exchange (planes, sum(sizes)) -> (ranks, planes, sizes[rank]): every rank's values at this rank's columns.

    A plane holds one value per column, such as one statistic of the logits.
    """
    pg = resolve(group)
    size, ranks = sizes[dist.get_rank(pg)], len(sizes)
    out = x.new_empty(ranks * size, len(x))
    dist.all_to_all_single(out, x.T.contiguous(), [size] * ranks, list(sizes), group=pg)
    return out.view(ranks, size, len(x)).transpose(1, 2).contiguous()


def _give_back(x: Tensor, sizes: Sequence[int], group: str) -> Tensor:
    """Apply the adjoint of `_exchange`: (ranks, planes, sizes[rank]) -> (planes, sum(sizes))."""
    ranks, planes, size = x.shape
    out = x.new_empty(sum(sizes), planes)
    sent = x.transpose(1, 2).reshape(ranks * size, planes).contiguous()
    dist.all_to_all_single(out, sent, list(sizes), [size] * ranks, group=resolve(group))
    return out.T.contiguous()


def _all_reduce(x: Tensor, after: Tensor, group: str) -> tuple[Tensor, Tensor]:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=resolve(group))
    return out, after.clone(memory_format=torch.contiguous_format)


def _size_here(sizes: Sequence[int], group: str) -> int:
    return sizes[dist.get_rank(resolve(group))]


_Collective = Callable[..., Tensor]


def _define(name: str, adjoint: str, run: _Collective, fake: _Collective, more: str = "") -> None:
    op = f"fastclip::{name}"
    torch.library.define(op, f"(Tensor x, SymInt[] sizes, str group{more}) -> Tensor", tags=TAGS)
    torch.library.impl(op, "default", run)
    torch.library.register_fake(op, fake)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.sizes, ctx.group, *ctx.more = inputs

    def backward(ctx: Any, d: Tensor) -> tuple[Any, ...]:
        d_x = getattr(torch.ops.fastclip, adjoint)(d.contiguous(), ctx.sizes, ctx.group)
        return d_x, None, None, *[None] * len(ctx.more)

    torch.library.register_autograd(op, backward, setup_context=save)


_define(
    "gather_rows",
    "reduce_rows",
    _gather,
    lambda x, sizes, group, after=None: x.new_empty(sum(sizes), *x.shape[1:]),
    ", Tensor? after=None",
)
_define(
    "reduce_rows",
    "gather_rows",
    _reduce,
    lambda x, sizes, group: x.new_empty(_size_here(sizes, group), *x.shape[1:]),
)
_define(
    "exchange_columns",
    "give_back_columns",
    _exchange,
    lambda x, sizes, group: x.new_empty(len(sizes), len(x), _size_here(sizes, group)),
)
_define(
    "give_back_columns",
    "exchange_columns",
    _give_back,
    lambda x, sizes, group: x.new_empty(x.shape[1], sum(sizes)),
)
torch.library.define("fastclip::sum_over_ranks", "(Tensor x, Tensor after, str group) -> (Tensor, Tensor)", tags=TAGS)
torch.library.impl("fastclip::sum_over_ranks", "default", _all_reduce)
torch.library.register_fake(
    "fastclip::sum_over_ranks", lambda x, after, group: (x.new_empty(x.shape), after.new_empty(after.shape))
)


def _save_group(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.group = inputs[-1]


def _sum_backward(ctx: Any, d: Tensor, d_after: Tensor) -> tuple[Any, ...]:
    """Return the gradients of x and `after`.

    The gradient of `after` is passed on unchanged. It is an output of this op, so that the backward of the collective
    that computed `after` runs after this op.
    """
    return *torch.ops.fastclip.sum_over_ranks(d, d_after, ctx.group), None


torch.library.register_autograd("fastclip::sum_over_ranks", _sum_backward, setup_context=_save_group)


def gather_rows(x: Tensor, sizes: Sequence[int], group: str, after: Tensor | None = None) -> Tensor:
    """Gather the rows of all ranks in order, (sizes[rank], ...) -> (sum(sizes), ...).

    The gradient of x is summed over the ranks.
    """
    return torch.ops.fastclip.gather_rows(x, sizes, group, after)


def exchange_columns(x: Tensor, sizes: Sequence[int], group: str) -> Tensor:
    """Return every rank's values at the columns of this rank: (planes, sum(sizes)) -> (ranks, planes, sizes[rank]).

    A plane holds one value per column, such as one statistic of the logits.
    """
    return torch.ops.fastclip.exchange_columns(x, sizes, group)


def sum_over_ranks(x: Tensor, after: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """Return the sum of x over the ranks, and `after`. The gradient of x is summed over the ranks, too.

    The caller must use the returned `after` from then on: this fixes the order of the collectives.
    """
    out: tuple[Tensor, Tensor] = torch.ops.fastclip.sum_over_ranks(x, after, group)
    return out
