"""The files of the highest scores: exact."""

from __future__ import annotations

import numpy as np

from fastclip.losses.ties import TIE
from fastclip.search.index import Pictures, Vector

__all__ = ["top"]


def top(pictures: Pictures, query: Vector, count: int) -> list[tuple[bytes, float, int]]:
    """The `count` files of the highest scores <query, vector>, with these and the ids of their contents.

    The highest is the first. What comes within 2^-20 |query| of it is equal to it and has its score, and so on with the
    highest of the others; of equal ones the first by path leads.
    """
    if not pictures.paths or count < 1:
        return []
    scores = (pictures.vectors @ query)[pictures.rows]
    scores[np.isnan(scores)] = np.inf  # of a file that was damaged: seen, and not passed over
    places, tie = np.arange(len(scores)), TIE * float(np.linalg.norm(query.astype(np.float64)))
    if count < len(scores):  # a sort of all scores would take longer than their products
        least = np.partition(scores, len(scores) - count)[len(scores) - count] - tie
        places = np.flatnonzero(scores >= least)  # more than `count` where some are equal
    # Of groups: each begins with the highest score that is left, and ends where rounding no longer decides
    order = places[np.argsort(-scores[places])]
    falling, begin, best = -scores[order], 0, list[tuple[int, float]]()
    while begin < min(count, len(order)):
        end = int(np.searchsorted(falling, falling[begin] + tie, side="right"))
        best += [(int(place), -float(falling[begin])) for place in np.sort(order[begin:end])]
        begin = end
    return [(pictures.paths[k], score, int(pictures.contents[pictures.rows[k]])) for k, score in best[:count]]
