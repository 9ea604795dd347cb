"""Zero-shot classification: a picture gets the class whose captions it is closest to."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fastclip.data.classes.names import shown_names
from fastclip.data.classes.prompts import read_templates
from fastclip.data.identity import picture_states
from fastclip.data.source import Source
from fastclip.embedding.features import FeatureStore, image_features, resumable, text_features
from fastclip.evaluation.classification import (
    class_ranks,
    classification_metrics,
    labelled,
    mean_directions,
    mistakes,
    predicted_classes,
)
from fastclip.evaluation.results import result
from fastclip.evaluation.retrieval import check_finite
from fastclip.models.embedder import Embedder

__all__ = ["ZeroShot", "class_accuracies", "class_embeddings", "templates_for", "zero_shot"]

logger = logging.getLogger(__name__)
_CONFUSED = 3  # classes that `class_accuracies` lists beside each


class ZeroShot(NamedTuple):
    """Predictions for the pictures of a source, of the K that can be used and have a class."""

    result: dict[str, Any]  # as `fastclip.evaluation.results.result`
    labels: Tensor  # (K,) int64, places in the source's `class_names`
    predictions: Tensor  # (K,) int64
    indices: Tensor  # (K,) int64, which samples of the source they are


def zero_shot(
    embedder: Embedder,
    source: Source,
    *,
    templates: Sequence[str],
    classes: Tensor | None = None,
    dataset: str | None = None,
    pretrained: str = "",
    batch_size: int = 256,
    workers: int = 0,
    progress: bool = False,
    stores: list[FeatureStore] | None = None,
) -> ZeroShot:
    """Classify the pictures of a source by captions of its classes (Radford et al. 2021, section 3.1).

    Args:
        templates: captions with ``{}`` in place of a class name.
        classes: (C, D), the `class_embeddings`; default: they are computed.
        dataset, pretrained: what the result calls the source and the weights.
        batch_size, workers, progress: as `fastclip.embedding.features.image_features`'s.
        stores: gets what is kept to go on after a stop; clear them when the result is written.

    Raises:
        ValueError: no classes, or no picture has one; as `image_features` does.
    """
    names = source.class_names
    if not names:
        raise ValueError(f"{source.spec}: these data have no classes")
    if classes is None:
        classes = class_embeddings(embedder, names, templates, stores=stores, progress=progress)
    # the names too, as the labels are kept with the features
    store = resumable(stores, embedder, [*names, *picture_states(source)])
    images = image_features(embedder, source, batch_size=batch_size, workers=workers, store=store, progress=progress)
    features, labels, indices = labelled(images, source.spec)
    check_finite(features, source.spec)
    check_finite(classes, f"the classes of {source.spec}")
    if twins := [name for name, number in Counter(names).items() if number > 1]:
        logger.info("%s: classes of one name, which no model can tell apart: %s", source.spec, shown_names(twins))
    ranks = class_ranks(features, classes, labels, names)
    report = result(
        dataset=source.spec if dataset is None else dataset,
        task="zeroshot_classification",
        model=embedder.name,
        pretrained=pretrained,
        metrics=classification_metrics(ranks, labels, len(names)),
        templates=len(templates),
        classes=len(names),
        images=len(labels),
        skipped=len(source) - len(labels),
    )
    return ZeroShot(report, labels, predicted_classes(features, classes, labels, ranks, names), indices)


def templates_for(source: Source, name: str | None = None) -> tuple[str, ...]:
    """`read_templates` of `name`; default: the source's own, or CLIP's 80 where it has none."""
    if name is None and source.templates:
        return source.templates
    return read_templates(name or "openai")


def class_embeddings(
    embedder: Embedder,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    stores: list[FeatureStore] | None = None,
    progress: bool = False,
) -> Tensor:
    """One unit vector a class, (C, D): the mean of the unit vectors of its captions, made one again.

    Radford et al. 2021, section 3.1.4. Classes of the same name have the same bits.

    Args:
        templates: captions with ``{}`` in place of the class name.
        stores, progress: as `zero_shot`'s.
    """
    names = {name: place for place, name in enumerate(dict.fromkeys(class_names))}
    captions = [template.format(name) for name in names for template in templates]
    store = resumable(stores, embedder, captions)
    features = text_features(embedder, captions, store=store, progress=progress)
    # by name, not by class: namesakes must not differ by the rounding of another batch
    means = mean_directions(features.unflatten(0, (len(names), len(templates))))
    return means[[names[name] for name in class_names]]


def class_accuracies(answers: ZeroShot, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """List every class: its name, pictures, ``acc1``, None without pictures, and what they are most often taken for."""
    pictures = answers.labels.bincount(minlength=len(class_names)).tolist()
    hits = answers.labels[answers.labels == answers.predictions].bincount(minlength=len(class_names)).tolist()
    taken_for: list[list[dict[str, Any]]] = [[] for _ in class_names]
    for place, other, images in mistakes(answers.labels, answers.predictions).tolist():
        if len(taken_for[place]) < _CONFUSED:
            taken_for[place].append({"name": class_names[other], "images": images})
    return [
        {"name": name, "images": size, "acc1": hit / size if size else None, "taken_for": others}
        for name, size, hit, others in zip(class_names, pictures, hits, taken_for, strict=True)
    ]
