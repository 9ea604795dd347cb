"""Exact search for the files with the highest scores."""

from __future__ import annotations

import numpy as np

from fastclip.losses.inputs.ties import TIE
from fastclip.search.index import Pictures, Vector

__all__ = ["top"]


def top(pictures: Pictures, query: Vector, count: int) -> list[tuple[bytes, float, int]]:
    """Return the path, score and content id of the `count` files with the highest scores <query, vector>.

    Scores that differ by rounding only are ties: all files within 2^-20 |query| of the highest score get that score and
    are sorted by path, then the same is done with the remaining files. This makes the order independent of rounding.
    """
    if not pictures.paths or count < 1:
        return []
    scores = (pictures.vectors @ query)[pictures.rows]
    scores[np.isnan(scores)] = np.inf  # NaN of a damaged index comes first, so that it is noticed
    places, tie = np.arange(len(scores)), TIE * float(np.linalg.norm(query.astype(np.float64)))
    if count < len(scores):  # sorting all scores would take longer than computing them
        least = np.partition(scores, len(scores) - count)[len(scores) - count] - tie
        places = np.flatnonzero(scores >= least)  # can be more than `count` with ties
    # Groups of ties: each begins with the highest remaining score and ends where the difference exceeds rounding
    order = places[np.argsort(-scores[places])]
    falling, begin, best = -scores[order], 0, list[tuple[int, float]]()
    while begin < min(count, len(order)):
        end = int(np.searchsorted(falling, falling[begin] + tie, side="right"))
        best += [(int(place), -float(falling[begin])) for place in np.sort(order[begin:end])]
        begin = end
    return [(pictures.paths[k], score, int(pictures.contents[pictures.rows[k]])) for k, score in best[:count]]
