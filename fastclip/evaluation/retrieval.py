"""Retrieval: how often what belongs to a query is among the K items most similar to it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.losses.ties import TIE
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
_CPU_SIDE = 1024  # of a tile of similarities: 4 MiB of float32, which a core's cache holds
_GPU_SIDE = 4096  # 64 MiB: a smaller product leaves most of a GPU idle


def retrieval_recalls(
    image_features: Tensor,
    text_features: Tensor,
    pairs: Tensor,
    *,
    ks: Sequence[int] = (1, 5, 10),
    chunk: int | None = None,
) -> dict[str, float]:
    """Recall at K in both directions, as papers on CLIP report it; no M x N matrix is stored.

    A text is a hit at K when one of its images is among the K images most similar to it, an image when one of its
    texts is. The keys are those of CLIP_benchmark (LAION, ``metrics/zeroshot_retrieval.py``), for each K of ``ks``:
    ``image_retrieval_recall@K``, the share of the texts that are hits, and ``text_retrieval_recall@K``, of the images.

    Two things differ from CLIP_benchmark. It takes the first K of ``topk``, which orders items that are alike at will,
    so that a model whose features are all the same can score anything; here whatever does not belong to the query and
    comes within 2^-20 of the best that does is counted before it, and such a model scores chance at best. And there a
    text has one image; here any number, and those with no partner at all are left out of the mean.

    Args:
        image_features: (M, D), of any length; float32, or float64, in which they are then compared.
        text_features: (N, D).
        pairs: (P, 2) int64, the (image, text) that belong together.
        ks: each at least 1; may be larger than M and N.
        chunk: sides of the tiles in which similarities are computed; default: 1,024 on a CPU, 4,096 on a GPU.

    Raises:
        ValueError: shapes, a K or a chunk below 1, no pair, or a pair of what is not there.
    """
    if any(k < 1 for k in ks):
        raise ValueError(f"ks must be at least 1, got {tuple(ks)}")
    if not len(pairs):
        raise ValueError("pairs is empty: no text belongs to an image")
    return recalls(*retrieval_ranks(image_features, text_features, pairs, chunk=chunk), ks=ks)


def recalls(of_images: Tensor, of_texts: Tensor, *, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Return `retrieval_recalls` of the ranks that `retrieval_ranks` returns."""
    images = {f"image_retrieval_recall@{k}": recall(of_texts, k) for k in ks}
    return images | {f"text_retrieval_recall@{k}": recall(of_images, k) for k in ks}


def recall(ranks: Tensor, k: int) -> float:
    """Share of the queries that have a rank (`best_ranks`) for which it is below `k`."""
    ranked = ranks >= 0
    return int((ranked & (ranks < k)).sum()) / int(ranked.sum())


def best_ranks(queries: Tensor, items: Tensor, pairs: Tensor, *, chunk: int | None = None) -> Tensor:
    """How many items that do not belong to a query are at least as similar to it as the best that does, (Q,) int64.

    -1 for a query to which nothing belongs. Similarity is the cosine in float32 (float64 for such features), whatever
    autocast is on. What is not finite counts against the model: a query ranks last, an item before what belongs.

    Args:
        queries, items: (Q, D) and (N, D).
        pairs: (P, 2) int64, the (query, item) that belong together.
        chunk: as of `retrieval_recalls`.
    """
    return _ranks(queries, items, pairs, chunk, both=False)[0]


def retrieval_ranks(
    image_features: Tensor, text_features: Tensor, pairs: Tensor, *, chunk: int | None = None, progress: bool = False
) -> tuple[Tensor, Tensor]:
    """`best_ranks` of the images among the texts (M,), and of the texts among the images (N,), in one pass.

    Arguments as of `retrieval_recalls`; `progress` shows how far it is, on stderr.
    """
    of_images, of_texts = _ranks(image_features, text_features, pairs, chunk, both=True, progress=progress)
    return of_images, of_texts


@torch.no_grad()
def top_items(queries: Tensor, items: Tensor, k: int, *, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """The K items most similar to each query: cosines (Q, K) and indices (Q, K) int64, the best first.

    What comes within 2^-20 of the best is equal to it, and so on with the best of the others: items that are equal
    share their largest cosine, and the lower index leads. What is not finite comes last. No Q x N matrix is stored.

    Args:
        queries, items: (Q, D) and (N, D), as of `best_ranks`; compared in float32.
        k: at least 1; K is the smaller of it and N.
        chunk: as of `retrieval_recalls`.
    """
    _check(queries, items, torch.empty(0, 2, dtype=torch.int64), chunk)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    side = _side(queries, chunk)
    best = torch.empty(len(queries), min(k, len(items)), dtype=torch.int64, device=queries.device)
    with torch.autocast(queries.device.type, enabled=False):
        queries, items = unit_rows(queries).float(), unit_rows(items).float()
        for i in range(0, len(queries), side):
            keys = _best_keys(queries[i : i + side], items, k + 1, side)  # one more shows a tie at the end
            cosines = _cosines(keys)
            groups = _groups(cosines)
            cut = groups[:, k - 1 : k] == groups[:, k:]  # more are equal to the last than there is room for
            # the whole chunk again, as the product of fewer rows has other bits; large sets have a tie in most chunks
            if bool((groups != cosines).any()) or bool(cut.any()):
                keys = _best_keys(queries[i : i + side], items, k, side, groups.flip(1))
            best[i : i + side] = keys[:, :k]
    return _cosines(best), 0xFFFFFFFF - (best & 0xFFFFFFFF)


def _best_keys(queries: Tensor, items: Tensor, k: int, side: int, groups: Tensor | None = None) -> Tensor:
    """(B, K) `_keys` of the K most similar items, the best first; cosines of `groups`, ascending, count as theirs."""
    best = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for j in range(0, len(items), side):
        block = items[j : j + side]
        keys = _keys(queries @ block.T, j, groups)
        keys = torch.cat([best, keys.topk(min(k, len(block)), dim=1).values], dim=1)
        best = keys.topk(min(k, keys.shape[1]), dim=1).values
    return best


def _groups(cosines: Tensor) -> Tensor:
    """(B, K) cosines, the largest first -> the largest cosine of each one's group of equals."""
    groups = cosines.clone()
    for j in range(1, cosines.shape[1]):
        before = groups[:, j - 1]
        groups[:, j] = cosines[:, j].where(cosines[:, j] < least_alike(before), before)
    return groups


def _cosines(keys: Tensor) -> Tensor:
    """Decode the cosines of `_keys`."""
    bits = (keys >> 32).int()
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)


def _keys(similarities: Tensor, first: int, groups: Tensor | None) -> Tensor:
    """(B, N) float32 of the items from `first` on -> int64 of the same order, lower indices before higher ones."""
    similarities = similarities.nan_to_num(-torch.inf) + 0.0  # -0.0 becomes 0.0
    if groups is not None:
        above = torch.searchsorted(groups, similarities).clamp(max=groups.shape[1] - 1)
        group = groups.gather(1, above)
        similarities = group.where(similarities >= least_alike(group), similarities)
    bits = similarities.view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # as floats are, read as integers
    indices = torch.arange(first, first + similarities.shape[1], device=similarities.device)
    return (ordered << 32) | (0xFFFFFFFF - indices)


@torch.no_grad()
def _ranks(
    queries: Tensor, items: Tensor, pairs: Tensor, chunk: int | None, *, both: bool, progress: bool = False
) -> list[Tensor]:
    """`best_ranks` of the queries, and of the items as well where `both` are asked for."""
    _check(queries, items, pairs, chunk)
    with torch.autocast(queries.device.type, enabled=False):
        queries, items = unit_rows(queries), unit_rows(items)
        tiles = _Tiles(queries, items, pairs.to(queries.device), _side(queries, chunk))
        cosines = queries.new_empty(len(pairs))
        for tile in tiles.with_pairs():
            cosines[tile.pairs] = tile.similarities()[tile.paired]  # of the very product that they are compared in
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
    """Counts, tile by tile, the others that are at least as similar to each of `size` rows as its best partner.

    Args:
        rows: (P,) int64, of each pair.
        cosines: (P,), of each pair.
    """

    def __init__(self, rows: Tensor, cosines: Tensor, size: int, others: int) -> None:
        self._best = cosines.new_full((size,), -torch.inf).scatter_reduce_(0, rows, cosines, "amax")
        self._nearer = torch.zeros(size, dtype=torch.int64, device=rows.device)
        self._others = others

    def count(self, rows: slice, similarities: Tensor) -> None:
        """Similarities of these rows and some of the others; NaN is near."""
        further = similarities < least_alike(self._best[rows]).unsqueeze(1)
        self._nearer[rows] += similarities.shape[1] - further.view(torch.uint8).sum(1, dtype=torch.int32)

    def ranks(self) -> Tensor:
        """As `best_ranks`: -1 where nothing belongs to a row, and the last where what does is not finite."""
        last = torch.where(self._best.isnan(), self._others, -1)
        return self._nearer.where(self._best > -torch.inf, last)


def least_alike(best: Tensor, size: float | Tensor = 1.0) -> Tensor:
    """Return the least that rounding may make of `best`: 2^-20 below it, in units of `size`, which is 1 for cosines.

    The product of the same two rows differs with where they are in their matrices, and from processor to processor.
    """
    return best - TIE * size


def first_best(similarities: Tensor) -> Tensor:
    """(B, N) cosines -> the first place of those that are equal to the largest (B,) int64; NaN is the largest."""
    similarities = similarities.nan_to_num(torch.inf, torch.inf, -torch.inf)
    alike = similarities >= least_alike(similarities.amax(dim=1, keepdim=True))
    return alike.view(torch.uint8).argmax(dim=1)


class _Tile(NamedTuple):
    queries: Tensor  # of the tile
    items: Tensor
    rows: slice
    columns: slice
    pairs: slice  # of the sorted pairs, those in the tile
    paired: tuple[Tensor, Tensor]  # where they are in it

    def similarities(self) -> Tensor:
        return self.queries @ self.items.T


class _Tiles:
    """Tiles of the similarities of queries and items; `pairs` are sorted by tile, (2, P)."""

    def __init__(self, queries: Tensor, items: Tensor, pairs: Tensor, side: int) -> None:
        self._queries, self._items, self._side = queries, items, side
        self._across = ceil_div(len(items), side)
        tile = pairs[:, 0] // side * self._across + pairs[:, 1] // side
        tile, order = tile.sort()  # so that each tile's pairs are a slice
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
    """Count in the log those of a model's features (B, D) on `what` that are not finite.

    Raises:
        ValueError: none is finite; what would be counted is the number of items, and not the model.
    """
    finite = int(features.isfinite().all(1).sum())
    if not finite and len(features):
        raise ValueError(f"{what}: the model's features are not finite")
    if finite < len(features):
        logger.warning("%s: %d of %d features are not finite", what, len(features) - finite, len(features))


def unit_rows(x: Tensor) -> Tensor:
    """(B, D) -> the same of length 1, in float32 at least."""
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
        raise ValueError(f"pairs must be below {len(queries)} and {len(items)}, the numbers of what is paired")
