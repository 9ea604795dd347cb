"""Retrieval: how often what belongs to a query is among the K items most similar to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["best_ranks", "recall", "retrieval_recalls", "unit_rows"]

# Cosines nearer than that are alike: rounding decides which is larger (as in fastclip.contrastive_stats).
_TIE = 2.0**-20
_CHUNK = 2**24  # similarities at a time, 64 MiB of float32


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
        chunk: queries at a time; as many as 64 MiB hold.

    Raises:
        ValueError: shapes, a K or a chunk below 1, no pair, or a pair of what is not there.
    """
    if any(k < 1 for k in ks):
        raise ValueError(f"ks must be at least 1, got {tuple(ks)}")
    if not len(pairs):
        raise ValueError("pairs is empty: no text belongs to an image")
    of_images = best_ranks(image_features, text_features, pairs, chunk=chunk)
    of_texts = best_ranks(text_features, image_features, pairs.flip(1), chunk=chunk)
    found = {f"image_retrieval_recall@{k}": recall(of_texts, k) for k in ks}
    return found | {f"text_retrieval_recall@{k}": recall(of_images, k) for k in ks}


def recall(ranks: Tensor, k: int) -> float:
    """Share of the queries that have a rank (`best_ranks`) for which it is below `k`."""
    some = int((ranks >= 0).sum())
    return int(((ranks >= 0) & (ranks < k)).sum()) / some


@torch.no_grad()
def best_ranks(queries: Tensor, items: Tensor, pairs: Tensor, *, chunk: int | None = None) -> Tensor:
    """How many items that do not belong to a query are at least as similar to it as the best that does, (Q,) int64.

    -1 for a query to which nothing belongs. Similarity is the cosine in float32 (float64 for such features), whatever
    autocast is on. What is not finite counts against the model: a query ranks last, an item before what belongs.

    Args:
        queries, items: (Q, D) and (N, D).
        pairs: (P, 2) int64, the (query, item) that belong together.
        chunk: queries at a time; as many as 64 MiB hold.
    """
    _check(queries, items, pairs, chunk)
    rows = chunk or max(1, _CHUNK // max(1, len(items)))
    pairs = pairs.to(queries.device)
    query, item = pairs[pairs[:, 0].argsort()].T.contiguous()
    starts = torch.arange(0, len(queries), rows, device=query.device)
    shares = torch.searchsorted(query, starts).tolist()[1:]  # of the sorted pairs, where each block's begin
    ranks = torch.empty(len(queries), dtype=torch.int64, device=queries.device)
    with torch.autocast(queries.device.type, enabled=False):
        queries, items = unit_rows(queries), unit_rows(items)
        blocks = zip(starts.tolist(), queries.split(rows), query.tensor_split(shares), item.tensor_split(shares))
        for start, block, own_query, own_item in blocks:
            ranks[start : start + rows] = _block_ranks(block @ items.T, own_query - start, own_item)
    return ranks


def _block_ranks(similarities: Tensor, query: Tensor, item: Tensor) -> Tensor:
    """`best_ranks` of the rows of similarities (B, N), which are written over; query, item (P,): their pairs."""
    best = similarities.new_full((len(similarities),), -torch.inf)
    best.scatter_reduce_(0, query, similarities[query, item], "amax")
    similarities[query, item] = -torch.inf
    nearer = (~(similarities < best[:, None] - _TIE)).sum(1)  # so written that NaN is nearer
    return nearer.where(best > -torch.inf, torch.where(best.isnan(), similarities.shape[1], -1))


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
