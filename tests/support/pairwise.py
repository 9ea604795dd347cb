"""Few of a matrix of tests: each level of each axis, each pair of levels of two axes; none that is marked `full`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations

import pytest


def cover(rows: Sequence[Mapping[str, Hashable]]) -> list[int]:
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


def levels(item: pytest.Item) -> dict[str, Hashable]:
    """Of each axis of a test's matrix its level: an axis is a `parametrize`, which may name several arguments, or a
    fixture with parameters. Values are told apart as objects: those of a level are one object in all tests."""
    level = {name: id(value) for name, value in item.callspec.params.items()}  # type: ignore[attr-defined]
    axes: dict[str, Hashable] = {}
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        axes[",".join(names)] = tuple(level.pop(name.strip()) for name in names)
    return axes | level


def split(items: Sequence[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Split collected tests into those to run and those that are left to `--full`.

    These are what `@pytest.mark.pairwise` spares, and cases marked `full` unless no other of their test was asked for.
    """
    matrices = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec"):
            matrices[item.nodeid.partition("[")[0]].append(item)
    left = set()
    for matrix in matrices.values():
        chosen = [item for item in matrix if not item.get_closest_marker("full")] or matrix
        if matrix[0].get_closest_marker("pairwise"):
            chosen = [chosen[k] for k in cover([levels(item) for item in chosen])]
        left |= set(matrix) - set(chosen)
    return [item for item in items if item not in left], [item for item in items if item in left]
