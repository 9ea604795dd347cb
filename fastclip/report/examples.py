"""What a model makes of a data set: its metrics, which classes it confuses, its best and its worst retrievals."""

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

_SHOWN = 6  # retrievals, best and worst each, in both directions
_HITS = 5  # of each
_PAIRS = 12  # of classes, the most confused
_MOST_CLASSES = 1000  # of a matrix


class Hit(NamedTuple):
    """A picture or a text that was found."""

    item: int
    place: int  # from 1
    score: float  # cosine
    right: bool  # it belongs to the query


class Example(NamedTuple):
    """A query and what was found for it."""

    query: int
    place: int  # of the best that belongs to it, from 1; a tie counts against the model
    hits: list[Hit]  # those in front, and the best that belongs to the query where it is not among them


class Confusion(NamedTuple):
    counts: NDArray[np.int64] | None  # (C, C), class and what it is taken for; None for more than 1,000 classes
    pairs: list[tuple[int, int, int, float]]  # most confused: class, taken for, samples, share of the class


class Examined(NamedTuple):
    """A source as a model sees it; pictures count as in `kept`."""

    metrics: dict[str, float]  # those of `fastclip.evaluation.validate`
    kept: list[int]  # samples of the source that can be used
    texts: list[str]  # the captions, each once, then what the classes add
    captions: int  # how many of them
    confusion: Confusion | None  # None without classes
    of_texts: tuple[list[Example], list[Example]]  # best and worst, pictures found for texts
    of_images: tuple[list[Example], list[Example]]  # likewise texts for pictures


def examine(
    embedder: Embedder,
    source: Source,
    *,
    batch_size: int = 256,
    workers: int = 0,
    stores: list[FeatureStore] | None = None,
    progress: bool = False,
) -> Examined:
    """Embed a source and look at it; options and errors as `image_features`'.

    Args:
        stores: gets what is kept to go on after a stop; clear them when the result is written.
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
    """`Confusion.pairs`, whatever the number of classes."""
    sizes = labels.bincount()
    pairs = mistakes(labels, predictions)[:_PAIRS].tolist()
    return [(place, other, count, count / int(sizes[place])) for place, other, count in pairs]


def _best_and_worst(queries: Tensor, items: Tensor, pairs: Tensor) -> tuple[list[Example], list[Example]]:
    """By the place of what belongs to a query, then by its cosine; no query is in both."""
    ranks = best_ranks(queries, items, pairs)
    # in parts, as the rows of all pairs at once are P x D
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
