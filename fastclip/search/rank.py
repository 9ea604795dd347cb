"""The files of the highest scores: exact."""

from __future__ import annotations

import numpy as np

from fastclip.search.index import Pictures, Vector

__all__ = ["top"]


def top(pictures: Pictures, query: Vector, count: int) -> list[tuple[bytes, float]]:
    """The `count` files of the highest scores <query, vector>, the highest first; of equal scores the first by path."""
    if not pictures.paths or count < 1:
        return []
    scores = (pictures.vectors @ query)[pictures.rows]
    places = np.arange(len(scores))
    if count < len(scores):
        least = np.partition(scores, len(scores) - count)[len(scores) - count]
        places = np.flatnonzero(scores >= least)  # more than `count` where some are equal
    best = places[np.lexsort((places, -scores[places]))][:count]
    return [(pictures.paths[place], float(scores[place])) for place in best]
