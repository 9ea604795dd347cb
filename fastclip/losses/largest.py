"""The largest similarities of each row, found block by block, in an order that rounding does not change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Largest", "largest"]

_SPARE = 8  # items kept beyond the k-th: with fewer than that many equal to it, one pass is enough


class Largest(NamedTuple):
    """The largest similarities of each row, in falling order."""

    values: Tensor  # (B, K), NaN before all others
    groups: Tensor  # (B, K) the first value of the group of equal items that each item belongs to
    indices: Tensor  # (B, K) int64, ascending within a group


def largest(
    similarities: Callable[[slice], Tensor],
    blocks: Sequence[slice],
    k: int,
    tie: float | Tensor = 0.0,
    *,
    masked: bool = False,
) -> Largest:
    """Return the K largest similarities of each row; K is the smaller one of `k` and the number of items N.

    The largest similarity and all that are at most `tie` smaller form a group of equal items. The largest one of the
    remaining items begins the next group. The items of a group are ordered by index, and those with the lowest indices
    are chosen if not all fit.

    A second pass over the blocks follows only if many items are equal to the k-th.

    Args:
        similarities: function that returns the columns of a block, (B, N') in fp32 or fp64, the same bits each time.
        blocks: consecutive ranges of columns, which cover all N.
        k: number of items, at least 1.
        tie: difference below which similarities are equal, a number or (B, 1).
        masked: -inf marks items that must not be chosen. Of those that fill a row, the indices are arbitrary.
    """
    N = blocks[-1].stop
    values, indices = _candidates(similarities, blocks, min(k + _SPARE, N))
    groups = _groups(_comparable(values), tie)
    by_index = indices.argsort(dim=1)
    order = by_index.gather(1, groups.gather(1, by_index).argsort(dim=1, descending=True, stable=True))
    indices = indices.gather(1, order)[:, :k]
    if k + _SPARE < N:
        last = groups[:, k - 1 : k]
        cut = groups[:, -1:] == last  # equal items may follow the candidates
        if masked:
            cut = cut & (last > -torch.inf)
        if bool(cut.any()):
            before = (groups > last).sum(dim=1, keepdim=True)
            equal = _first_equal(similarities, blocks, k, last, tie)
            place = torch.arange(k, device=indices.device) - before
            indices = torch.where(cut & (place >= 0), equal.gather(1, place.clamp_min(0)), indices)
    return Largest(values[:, :k], groups[:, :k], indices)


def _candidates(similarities: Callable[[slice], Tensor], blocks: Sequence[slice], K: int) -> tuple[Tensor, Tensor]:
    """Return the K largest values of each row, in falling order, and their indices."""
    best: list[Tensor] = []
    for block in blocks:
        z = similarities(block)
        found = z.topk(min(K, z.shape[1]), dim=1)
        values, indices = found.values, found.indices + block.start
        if best:
            values, indices = torch.cat([best[0], values], dim=1), torch.cat([best[1], indices], dim=1)
            values, places = values.topk(min(K, values.shape[1]), dim=1)
            indices = indices.gather(1, places)
        best = [values, indices]
    return best[0], best[1]


def _comparable(values: Tensor) -> Tensor:
    """Replace NaN, which `topk` puts before all other values, by infinity."""
    return values.nan_to_num(torch.inf, torch.inf, -torch.inf)


def _groups(values: Tensor, tie: float | Tensor) -> Tensor:
    """Return the first value of the group of equal items that each item belongs to; (B, K) in falling order."""
    groups = values.clone()
    near = values[:, 1:] >= values[:, :-1] - tie
    for j in near.any(dim=0).nonzero().flatten().tolist():  # no other column continues a group
        before = groups[:, j : j + 1]
        after = values[:, j + 1 : j + 2]
        groups[:, j + 1 : j + 2] = torch.where(after >= before - tie, before, after)
    return groups


def _first_equal(
    similarities: Callable[[slice], Tensor], blocks: Sequence[slice], k: int, last: Tensor, tie: float | Tensor
) -> Tensor:
    """Return the lowest indices (B, k) of the items that belong to the group that begins with `last` (B, 1).

    Rows with fewer such items are filled with N.
    """
    N, best = blocks[-1].stop, list[Tensor]()
    for block in blocks:
        z = _comparable(similarities(block))
        indices = torch.arange(block.start, block.stop, device=z.device)
        indices = torch.where((z <= last) & (z >= last - tie), indices, N)
        indices = torch.cat([*best, indices.topk(min(k, z.shape[1]), dim=1, largest=False).values], dim=1)
        best = [indices.topk(min(k, indices.shape[1]), dim=1, largest=False).values]
    return best[0]
