"""Results of a model on a dataset: metrics, confused classes, and the best and worst retrievals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastclip.data.identity import picture_states
from fastclip.data.source import Source
from fastclip.embedding.features import FeatureStore, ImageFeatures, image_features, resumable, text_features
from fastclip.evaluation.classification import class_ranks, confusion, mean_directions, mistakes, predicted_classes
from fastclip.evaluation.retrieval import best_ranks, check_finite, top_items
from fastclip.evaluation.validate import Texts, metrics_of, texts_of
from fastclip.models.embedder import Embedder

__all__ = ["Confusion", "Example", "Examined", "Hit", "examine"]

_SHOWN = 6  # retrievals shown per list: best and worst, in both directions
_HITS = 5  # results shown per retrieval
_PAIRS = 12  # most confused pairs of classes shown
_MOST_CLASSES = 1000  # largest number of classes with a confusion matrix


class Hit(NamedTuple):
    """An image or text that was retrieved."""

    item: int  # index of the image or text
    place: int  # rank, from 1
    score: float  # cosine similarity to the query
    right: bool  # whether it belongs to the query


class Example(NamedTuple):
    """A query and the items retrieved for it."""

    query: int  # index of the image or text
    place: int  # rank of the best item that belongs to the query, from 1; ties count against the model
    hits: list[Hit]  # the first items, and the best one that belongs to the query if it is not among them


class Confusion(NamedTuple):
    """Zero-shot predictions by class."""

    counts: NDArray[np.int64] | None  # (C, C) images by class and predicted class; None for more than 1,000 classes
    pairs: list[tuple[int, int, int, float]]  # most confused: class, predicted class, images, share of the class


class Examined(NamedTuple):
    """Result of `examine`. Image indices are positions in `kept`."""

    metrics: dict[str, float]  # metrics of `fastclip.evaluation.validate`
    kept: list[int]  # indices of the usable samples of the source
    texts: list[str]  # distinct captions, followed by the texts of the classes
    captions: int  # number of distinct captions
    confusion: Confusion | None  # None without classes
    of_texts: tuple[list[Example], list[Example]]  # best and worst retrievals of images by text
    of_images: tuple[list[Example], list[Example]]  # best and worst retrievals of texts by image


def examine(
    embedder: Embedder,
    source: Source,
    *,
    batch_size: int = 256,
    workers: int = 0,
    stores: list[FeatureStore] | None = None,
    progress: bool = False,
) -> Examined:
    """Embed a source and compute its metrics, confusion and retrievals.

    Options and errors are those of `fastclip.embedding.features.image_features`.

    Args:
        stores: list to which the stores of the features are appended. They let an interrupted call resume. Clear them
            when the result is written.
    """
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    store = resumable(stores, embedder, [*source.class_names, *picture_states(source)])
    images = image_features(embedder, source, workers=workers, store=store, **options)
    kept = images.indices.tolist()
    texts = texts_of(source, kept)
    store = resumable(stores, embedder, ["texts", *texts.texts])
    features = text_features(embedder, texts.texts, store=store, **options)
    check_finite(images.features, source.spec)
    check_finite(features, f"the captions of {source.spec}")
    captions = features[: texts.captions]
    return Examined(
        metrics=metrics_of(images.features, images.labels, features, texts),
        kept=kept,
        texts=texts.texts,
        captions=texts.captions,
        confusion=_confusion(images, features, texts),
        of_texts=_best_and_worst(captions, images.features, texts.pairs.flip(1)),
        of_images=_best_and_worst(images.features, captions, texts.pairs),
    )


def _confusion(images: ImageFeatures, features: Tensor, texts: Texts) -> Confusion | None:
    has_class = images.labels >= 0
    if not texts.classes.numel() or not bool(has_class.any()):
        return None
    classes, labels = mean_directions(features[texts.classes]), images.labels[has_class]
    ranks = class_ranks(images.features[has_class], classes, labels, texts.class_names)
    predictions = predicted_classes(images.features[has_class], classes, labels, ranks, texts.class_names)
    counts = confusion(labels, predictions, len(classes)).numpy() if len(classes) <= _MOST_CLASSES else None
    return Confusion(counts, _most_confused(predictions, labels))


def _most_confused(predictions: Tensor, labels: Tensor) -> list[tuple[int, int, int, float]]:
    """Return `Confusion.pairs`. This needs no matrix, so it works for any number of classes."""
    sizes = labels.bincount()
    pairs = mistakes(labels, predictions)[:_PAIRS].tolist()
    return [(place, other, count, count / int(sizes[place])) for place, other, count in pairs]


def _best_and_worst(queries: Tensor, items: Tensor, pairs: Tensor) -> tuple[list[Example], list[Example]]:
    """Return the best and the worst queries, by the rank of the best item that belongs to them, then by its cosine.

    No query is in both lists.
    """
    ranks = best_ranks(queries, items, pairs)
    # in parts, because the features of all P pairs at once would take P x D numbers
    cosines = torch.cat([(queries[part[:, 0]] * items[part[:, 1]]).sum(1) for part in pairs.split(2**14)])
    best = torch.full((len(queries),), -torch.inf).scatter_reduce_(0, pairs[:, 0], cosines, "amax")
    order = [k for _, _, k in sorted(zip(ranks.tolist(), (-best).tolist(), range(len(queries)))) if ranks[k] >= 0]
    shown = min(_SHOWN, max(1, len(order) // 2))
    first, last = order[:shown], order[shown:][-shown:][::-1]
    return _examples(first, queries, items, pairs, ranks), _examples(last, queries, items, pairs, ranks)


def _examples(chosen: Sequence[int], queries: Tensor, items: Tensor, pairs: Tensor, ranks: Tensor) -> list[Example]:
    if not chosen:
        return []
    examples = []
    for query, scores, places in zip(chosen, *top_items(queries[torch.tensor(chosen)], items, _HITS)):
        partners = pairs[pairs[:, 0] == query, 1]
        hits = [
            Hit(item, place, score, bool((partners == item).any()))
            for place, (item, score) in enumerate(zip(places.tolist(), scores.tolist()), start=1)
        ]
        place = int(ranks[query]) + 1
        if not any(hit.right for hit in hits):
            cosines = items[partners] @ queries[query]
            hits.append(Hit(int(partners[cosines.argmax()]), place, float(cosines.max()), True))
        examples.append(Example(query, place, hits))
    return examples
