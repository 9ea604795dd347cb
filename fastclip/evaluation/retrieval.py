"""Retrieval metrics: how often an item that belongs to a query is among the K items most similar to the query."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.losses.inputs.ties import TIE
from fastclip.losses.largest import largest
from fastclip.system.progress import Progress
from fastclip.system.rounding import ceil_div

__all__ = [
    "best_ranks",
    "check_finite",
    "first_best",
    "least_alike",
    "recall",
    "recalls",
    "retrieval_ranks",
    "retrieval_recalls",
    "top_items",
    "unit_rows",
]

logger = logging.getLogger(__name__)
_CPU_SIDE = 1024  # side of a tile of similarities: 4 MiB of float32, which fit in the cache of a core
_GPU_SIDE = 4096  # 64 MiB: smaller products leave most of a GPU idle


def retrieval_recalls(
    image_features: Tensor,
    text_features: Tensor,
    pairs: Tensor,
    *,
    ks: Sequence[int] = (1, 5, 10),
    chunk: int | None = None,
) -> dict[str, float]:
    """Compute recall at K in both directions, as reported by papers on CLIP, without storing an M x N matrix.

    A text is a hit at K if one of its images is among the K images most similar to it, and an image is a hit if one of
    its texts is among the K texts most similar to it.

    There are two differences from CLIP_benchmark. First, ties count against the model: an item that does not belong to
    the query comes first if its cosine is at most 2^-20 below that of the best item that belongs to the query.
    CLIP_benchmark takes the first K of ``topk``, whose order of equal items is arbitrary, so that a model with constant
    features can get any score; here such a model scores no better than chance. Second, a text may have any number of
    images, not only one. Images and texts without a partner are left out of the mean.

    Args:
        image_features: (M, D), float32 or float64, not necessarily normalised. Cosines are computed in float64 only if
            the features are float64.
        text_features: (N, D).
        pairs: (P, 2) int64, indices (image, text) that belong together.
        ks: values of K, each at least 1. They may exceed M and N.
        chunk: side of the tiles in which similarities are computed (default: 1,024 on a CPU, 4,096 on a GPU).

    Returns:
        For each K, ``image_retrieval_recall@K``, the share of the texts that are hits, and ``text_retrieval_recall@K``,
        the share of the images. The keys are those of CLIP_benchmark (LAION, ``metrics/zeroshot_retrieval.py``).

    Raises:
        ValueError: shapes do not fit, a K or the chunk is below 1, there are no pairs, or an index is out of range.
    """
    if any(k < 1 for k in ks):
        raise ValueError(f"ks must be at least 1, got {tuple(ks)}")
    if not len(pairs):
        raise ValueError("pairs is empty: no text belongs to an image")
    return recalls(*retrieval_ranks(image_features, text_features, pairs, chunk=chunk), ks=ks)


def recalls(of_images: Tensor, of_texts: Tensor, *, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Compute the metrics of `retrieval_recalls` from the ranks that `retrieval_ranks` returns."""
    images = {f"image_retrieval_recall@{k}": recall(of_texts, k) for k in ks}
    return images | {f"text_retrieval_recall@{k}": recall(of_images, k) for k in ks}


def recall(ranks: Tensor, k: int) -> float:
    """Return the share of queries with a rank below `k`, among all queries that have a rank (`best_ranks`)."""
    ranked = ranks >= 0
    return int((ranked & (ranks < k)).sum()) / int(ranked.sum())


def best_ranks(queries: Tensor, items: Tensor, pairs: Tensor, *, chunk: int | None = None) -> Tensor:
    """Return the rank of the best item that belongs to each query, (Q,) int64.

    The rank is the number of items that do not belong to the query and are at least as similar to it, and -1 if no item
    belongs to the query. Similarity is the cosine in float32 (float64 for float64 features), even under autocast.
    Features that are not finite count against the model: a query that is not finite gets the last rank, and an item
    that is not finite comes before the items that belong to a query.

    Args:
        queries: (Q, D) float.
        items: (N, D) float.
        pairs: (P, 2) int64, indices (query, item) that belong together.
        chunk: as in `retrieval_recalls`.

    Raises:
        ValueError: shapes do not fit, the chunk is below 1, or an index is out of range.
    """
    return _ranks(queries, items, pairs, chunk, both=False)[0]


def retrieval_ranks(
    image_features: Tensor, text_features: Tensor, pairs: Tensor, *, chunk: int | None = None, progress: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute the ranks of both directions in one pass.

    Args:
        image_features, text_features, pairs, chunk: as in `retrieval_recalls`.
        progress: show a progress bar on stderr.

    Returns:
        `best_ranks` of the images among the texts (M,), and of the texts among the images (N,).
    """
    of_images, of_texts = _ranks(image_features, text_features, pairs, chunk, both=True, progress=progress)
    return of_images, of_texts


@torch.no_grad()
def top_items(queries: Tensor, items: Tensor, k: int, *, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the K items most similar to each query, without storing a Q x N matrix.

    The most similar item and all items whose cosines are at most 2^-20 smaller form a group of equal items. The best of
    the remaining items begins the next group. The items of a group are ordered by index, and all of them are returned
    with the largest cosine of the group. Items that are not finite come last.

    Args:
        queries: (Q, D) float, compared in float32.
        items: (N, D) float.
        k: number of items, at least 1. K is the smaller one of `k` and N.
        chunk: as in `retrieval_recalls`.

    Returns:
        Cosines (Q, K) float32 and indices (Q, K) int64, the best first.

    Raises:
        ValueError: shapes do not fit, or `k` or the chunk is below 1.
    """
    _check(queries, items, torch.empty(0, 2, dtype=torch.int64), chunk)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    side = _side(queries, chunk)
    blocks = [slice(j, min(j + side, len(items))) for j in range(0, max(len(items), 1), side)]
    found = []
    with torch.autocast(queries.device.type, enabled=False):
        queries, items = unit_rows(queries).float(), unit_rows(items).float()
        for rows in queries.split(side):
            found.append(largest(partial(_cosines, rows, items), blocks, k, TIE))
    return torch.cat([x.groups for x in found]), torch.cat([x.indices for x in found])


def _cosines(queries: Tensor, items: Tensor, block: slice) -> Tensor:
    """Return the cosines of unit rows, with -inf, which comes last, in place of NaN."""
    return (queries @ items[block].T).nan_to_num(-torch.inf)


@torch.no_grad()
def _ranks(
    queries: Tensor, items: Tensor, pairs: Tensor, chunk: int | None, *, both: bool, progress: bool = False
) -> list[Tensor]:
    """Return `best_ranks` of the queries and, with `both`, also those of the items."""
    _check(queries, items, pairs, chunk)
    with torch.autocast(queries.device.type, enabled=False):
        queries, items = unit_rows(queries), unit_rows(items)
        tiles = _Tiles(queries, items, pairs.to(queries.device), _side(queries, chunk))
        cosines = queries.new_empty(len(pairs))
        for tile in tiles.with_pairs():
            cosines[tile.pairs] = tile.similarities()[tile.paired]  # the same product as below, so the bits agree
        rankings = [_Ranking(tiles.pairs[0], cosines, len(queries), len(items))]
        if both:
            rankings.append(_Ranking(tiles.pairs[1], cosines, len(items), len(queries)))
        with Progress("similarities", len(queries) * len(items), unit="pair", shown=progress) as bar:
            for tile in tiles:
                similarities = tile.similarities()
                similarities[tile.paired] = -torch.inf
                rankings[0].count(tile.rows, similarities)
                if both:
                    rankings[1].count(tile.columns, similarities.T)
                bar.moved(similarities.numel())
    return [ranking.ranks() for ranking in rankings]


class _Ranking:
    """Count, tile by tile, the items that are at least as similar to each row as the best item that belongs to it.

    Args:
        rows: row of each pair, (P,) int64.
        cosines: cosine of each pair, (P,).
        size: number of rows.
        others: number of items that the rows are compared with.
    """

    def __init__(self, rows: Tensor, cosines: Tensor, size: int, others: int) -> None:
        self._best = cosines.new_full((size,), -torch.inf).scatter_reduce_(0, rows, cosines, "amax")
        self._nearer = torch.zeros(size, dtype=torch.int64, device=rows.device)
        self._others = others

    def count(self, rows: slice, similarities: Tensor) -> None:
        """Add a tile of similarities between the given rows and some of the items; NaN counts as most similar."""
        further = similarities < least_alike(self._best[rows]).unsqueeze(1)
        self._nearer[rows] += similarities.shape[1] - further.view(torch.uint8).sum(1, dtype=torch.int32)

    def ranks(self) -> Tensor:
        """Return the ranks as `best_ranks` does: -1 without a partner, the last rank if the partners are not finite."""
        last = torch.where(self._best.isnan(), self._others, -1)
        return self._nearer.where(self._best > -torch.inf, last)


def least_alike(best: Tensor, size: float | Tensor = 1.0) -> Tensor:
    """Return the smallest value that counts as equal to `best`, 2^-20 of `size` below it; `size` is 1 for cosines.

    The tolerance covers rounding: the product of the same two rows depends on their positions in the matrices and on
    the processor.
    """
    return best - TIE * size


def first_best(similarities: Tensor) -> Tensor:
    """Return the first index per row whose cosine equals the largest one, (B, N) -> (B,) int64; NaN is the largest."""
    similarities = similarities.nan_to_num(torch.inf, torch.inf, -torch.inf)
    alike = similarities >= least_alike(similarities.amax(dim=1, keepdim=True))
    return alike.view(torch.uint8).argmax(dim=1)


class _Tile(NamedTuple):
    queries: Tensor  # rows of the tile
    items: Tensor  # columns of the tile
    rows: slice
    columns: slice
    pairs: slice  # range of the sorted pairs that lies in the tile
    paired: tuple[Tensor, Tensor]  # row and column of each of these pairs within the tile

    def similarities(self) -> Tensor:
        return self.queries @ self.items.T


class _Tiles:
    """Tiles of the matrix of similarities; the attribute `pairs`, (2, P), is sorted by tile."""

    def __init__(self, queries: Tensor, items: Tensor, pairs: Tensor, side: int) -> None:
        self._queries, self._items, self._side = queries, items, side
        self._across = ceil_div(len(items), side)
        tile = pairs[:, 0] // side * self._across + pairs[:, 1] // side
        tile, order = tile.sort()  # makes the pairs of each tile a slice
        self.pairs = pairs[order].T.contiguous()
        count = ceil_div(len(queries), side) * self._across
        self._ends = torch.searchsorted(tile, torch.arange(count + 1, device=tile.device)).tolist()

    def __iter__(self) -> Iterator[_Tile]:
        return map(self._tile, range(len(self._ends) - 1))

    def with_pairs(self) -> Iterator[_Tile]:
        return (self._tile(k) for k in range(len(self._ends) - 1) if self._ends[k] < self._ends[k + 1])

    def _tile(self, number: int) -> _Tile:
        i, j = (place * self._side for place in divmod(number, self._across))
        rows, columns = slice(i, i + self._side), slice(j, j + self._side)
        pairs = slice(*self._ends[number : number + 2])
        query, item = self.pairs[:, pairs]
        return _Tile(self._queries[rows], self._items[columns], rows, columns, pairs, (query - i, item - j))


def _side(x: Tensor, chunk: int | None) -> int:
    return chunk or (_CPU_SIDE if x.device.type == "cpu" else _GPU_SIDE)


def check_finite(features: Tensor, what: str) -> None:
    """Log how many rows of features (B, D) are not finite; `what` names the data in the message.

    Raises:
        ValueError: no row is finite, so that metrics would say nothing about the model.
    """
    finite = int(features.isfinite().all(1).sum())
    if not finite and len(features):
        raise ValueError(f"{what}: the model's features are not finite")
    if finite < len(features):
        logger.warning("%s: %d of %d features are not finite", what, len(features) - finite, len(features))


def unit_rows(x: Tensor) -> Tensor:
    """Scale the rows of x, (B, D), to unit length, in at least float32."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)


def _check(queries: Tensor, items: Tensor, pairs: Tensor, chunk: int | None) -> None:
    if queries.dim() != 2 or items.dim() != 2 or queries.shape[1] != items.shape[1]:
        raise ValueError(f"features must be (M, D) and (N, D), got {tuple(queries.shape)} and {tuple(items.shape)}")
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
        raise ValueError(f"pairs must be (P, 2) int64, got {tuple(pairs.shape)} {str(pairs.dtype)[6:]}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    sizes = torch.tensor([len(queries), len(items)], device=pairs.device)
    if bool(((pairs < 0) | (pairs >= sizes)).any()):
        raise ValueError(
            f"indices in pairs must be at least 0, below {len(queries)} in column 0 and below {len(items)} in column 1"
        )
