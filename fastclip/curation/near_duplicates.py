"""Find images that are nearly the same as an image before them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["near_duplicates"]

_ROWS = 2048  # vectors to compare at a time
_SAME = 1 - 1e-6  # in float32 the product of a unit vector with itself may be slightly below 1
_CHUNK = 16_384  # kept vectors that up to _ROWS vectors are compared with at a time


def near_duplicates(
    features: Iterable[Tensor], threshold: float, *, device: torch.device | str = "cpu"
) -> npt.NDArray[np.int64]:
    """Go through unit vectors in order, and drop each whose cosine with a kept vector is `threshold` or more.

    The result is exact: every vector is compared in float32 with all vectors that were kept before it. For K kept
    vectors of D numbers this takes about K^2 D operations: 5 s on one core for 20,000 vectors of 512 numbers, and 2,500
    times as long for 50 times as many. The memory needed on `device` is 4 * K * D bytes for the kept vectors, plus
    about 200 MiB.

    Args:
        features: blocks of vectors, each (k, D) float32, in order.
        threshold: the least cosine of near duplicates. Values above 0.999999 are reduced to it, because equal vectors
            may not have a product of exactly 1 in float32.
        device: device on which the products are computed.

    Returns:
        (N,) int64, for each vector -1 if it was kept, else the index of the first kept vector that it is near to.
        Indices are counted over all N vectors.
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
        # Rows of this block may be near to each other: if a row is kept, the later rows near to it are dropped.
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
    """Append the vectors to the last chunk if it has room, or else as a new chunk.

    Chunks bound the memory of the product with the kept vectors.
    """
    if kept and len(kept[-1]) + len(vectors) <= _CHUNK:
        kept[-1], places[-1] = torch.cat([kept[-1], vectors]), np.concatenate([places[-1], where])
    else:
        kept.append(vectors)
        places.append(where)
