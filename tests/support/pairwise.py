"""A small part of a test matrix that has each level of each axis and each pair of levels of two
axes, and no case marked `full`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations

import pytest


def cover(rows: Sequence[Mapping[str, Hashable]]) -> list[int]:
    """Find rows that contain every pair of levels that occurs in any row.

    Args:
        rows: the level of each axis, with the same axes in every row.

    Returns:
        Their indices in ascending order. The search is greedy: not the smallest set, but always the same one.
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
    """Return the level of each axis of a test's matrix. An axis is a `parametrize`, possibly of several arguments, or a
    fixture with parameters. Values are compared as objects, since all tests share the object of a level.
    """
    level = {name: id(value) for name, value in item.callspec.params.items()}  # type: ignore[attr-defined]
    axes: dict[str, Hashable] = {}
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        axes[",".join(names)] = tuple(level.pop(name.strip()) for name in names)
    return axes | level


def split(items: Sequence[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Split collected tests into those to run and those that only `--full` runs.

    The latter are the cases that `@pytest.mark.pairwise` saves, and cases marked `full` unless no other
    case of their test was selected.
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
