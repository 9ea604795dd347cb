"""Few of a matrix of tests: each level of each axis, and each pair of levels of two axes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations

import pytest


def cover(rows: Sequence[Mapping[str, int]]) -> list[int]:
    """Find rows that have every pair of levels that any row has.

    Args:
        rows: the level of each axis, the same axes in every row.

    Returns:
        Their indices, in order. Greedy: no smallest set, but the same one every time.
    """
    pairs = [set(combinations(row.items(), 2)) or set(row.items()) for row in rows]
    missing = set().union(*pairs)
    chosen = []
    while missing:
        best = max(range(len(rows)), key=lambda k: len(pairs[k] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return sorted(chosen)


def split(items: Sequence[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Split collected tests into those to run and those that `@pytest.mark.pairwise` leaves to `--full`."""
    matrices = defaultdict(list)
    for item in items:
        if item.get_closest_marker("pairwise"):
            matrices[item.nodeid.partition("[")[0]].append(item)
    left = set()
    for matrix in matrices.values():
        chosen = {matrix[k] for k in cover([item.callspec.indices for item in matrix])}  # type: ignore[attr-defined]
        left |= set(matrix) - chosen
    return [item for item in items if item not in left], [item for item in items if item in left]
