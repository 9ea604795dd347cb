"""Pictures that are nearly one that came before them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["near_duplicates"]

_ROWS = 2048  # compared at a time
_SAME = 1 - 1e-6  # the product of a unit vector with itself is about 1 in float32, and may be less
_CHUNK = 16_384  # kept vectors that they are compared with at a time


def near_duplicates(
    features: Iterable[Tensor], threshold: float, *, device: torch.device | str = "cpu"
) -> npt.NDArray[np.int64]:
    """Go through unit vectors in order and drop each whose cosine with one that was kept is `threshold` or more; a
    `threshold` of 1 is 0.999999, as float32 tells no more than that of equal vectors.

    Exact: every vector is compared with all that were kept before it, in float32, about K^2 D operations for K kept
    ones of D numbers. 20,000 of 512 take 5 s on one core, and 50 times as many take 2,500 times as long. Memory, that
    of `device`: the kept vectors, 4 K D bytes, and some 200 MiB.

    Args:
        features: (k, D) float32 each, one after the other.
        device: where the products are computed.

    Returns:
        (N,) of all vectors in order: -1 if it was kept, else the place among all of the first kept one that it is near
        to.
    """
    threshold = min(threshold, _SAME)
    results, kept, places, count = [np.empty(0, np.int64)], list[Tensor](), list[npt.NDArray[np.int64]](), 0
    for rows in (rows for block in features for rows in block.split(_ROWS)):
        rows = rows.to(device)
        near_to = np.full(len(rows), -1)
        for vectors, place in zip(kept, places):
            near = rows @ vectors.T >= threshold
            new = np.flatnonzero((near_to < 0) & near.any(1).cpu().numpy())
            near_to[new] = place[near[torch.from_numpy(new)].cpu().numpy().argmax(1)]
        # Rows of this block may be near to each other: the first that is kept drops those after it, in order
        near_each_other = (rows @ rows.T >= threshold).cpu().numpy()
        for i in range(len(rows)):
            if near_to[i] < 0:
                later = near_to[i + 1 :]
                later[near_each_other[i, i + 1 :] & (later < 0)] = count + i
        stays = np.flatnonzero(near_to < 0)
        if len(stays):
            _append(kept, places, rows[torch.from_numpy(stays).to(rows.device)], count + stays)
        results.append(near_to)
        count += len(rows)
    return np.concatenate(results)


def _append(
    kept: list[Tensor], places: list[npt.NDArray[np.int64]], vectors: Tensor, where: npt.NDArray[np.int64]
) -> None:
    """Append to the last chunk, if it has room, else a new one."""
    if kept and len(kept[-1]) + len(vectors) <= _CHUNK:
        kept[-1], places[-1] = torch.cat([kept[-1], vectors]), np.concatenate([places[-1], where])
    else:
        kept.append(vectors)
        places.append(where)
