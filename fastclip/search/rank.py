"""The files of the highest scores: exact."""

from __future__ import annotations

import numpy as np

from fastclip.search.index import Pictures, Vector

__all__ = ["top"]


def top(pictures: Pictures, query: Vector, count: int) -> list[tuple[bytes, float, int]]:
    """The `count` files of the highest scores <query, vector>, with these and the ids of their contents.

    The highest is the first, and of equal scores the first by path.
    """
    if not pictures.paths or count < 1:
        return []
    scores = (pictures.vectors @ query)[pictures.rows]
    places = np.arange(len(scores))
    if count < len(scores):
        least = np.partition(scores, len(scores) - count)[len(scores) - count]
        places = np.flatnonzero(scores >= least)  # more than `count` where some are equal
    best = places[np.lexsort((places, -scores[places]))][:count]
    contents = pictures.contents[pictures.rows[best]]
    return [(pictures.paths[k], float(scores[k]), int(content)) for k, content in zip(best, contents)]
