"""Zero-shot classification: an image is assigned to the class whose captions are most similar to it."""

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
_CONFUSED = 3  # maximum number of wrong predictions that `class_accuracies` lists per class


class ZeroShot(NamedTuple):
    """Predictions for the K images of a source that can be used and have a class."""

    result: dict[str, Any]  # see `fastclip.evaluation.results.result`
    labels: Tensor  # (K,) int64, true classes as indices into the source's `class_names`
    predictions: Tensor  # (K,) int64, predicted classes
    indices: Tensor  # (K,) int64, indices of the samples in the source


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
    """Classify the images of a source by captions of its classes (Radford et al. 2021, section 3.1).

    Args:
        embedder: model to evaluate.
        source: dataset with classes.
        templates: captions with ``{}`` in place of a class name.
        classes: class embeddings (C, D) (default: computed by `class_embeddings`).
        dataset: name of the dataset in the result (default: the source's).
        pretrained: name of the weights in the result.
        batch_size, workers, progress: as in `fastclip.embedding.features.image_features`.
        stores: list that receives the stores with which an interrupted call can be resumed. Clear them once the result
            is written. With None, nothing is stored.

    Raises:
        ValueError: the source has no classes, no image has a class, or no image can be used.
        OSError: a file of the source cannot be read.
    """
    names = source.class_names
    if not names:
        raise ValueError(f"{source.spec}: the dataset has no classes")
    if classes is None:
        classes = class_embeddings(embedder, names, templates, stores=stores, progress=progress)
    # The class names are part of the keys, because labels are stored with the features.
    store = resumable(stores, embedder, [*names, *picture_states(source)])
    images = image_features(embedder, source, batch_size=batch_size, workers=workers, store=store, progress=progress)
    features, labels, indices = labelled(images, source.spec)
    check_finite(features, source.spec)
    check_finite(classes, f"the classes of {source.spec}")
    if twins := [name for name, number in Counter(names).items() if number > 1]:
        logger.info("%s: several classes share a name and cannot be distinguished: %s", source.spec, shown_names(twins))
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
    """Return the templates called `name` (default: the source's templates, or CLIP's 80 if the source has none)."""
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
    """Return one unit vector per class, (C, D): the normalised mean of the unit vectors of its captions.

    The method is that of Radford et al. 2021, section 3.1.4. Classes of the same name have bitwise equal vectors.

    Args:
        embedder: model to embed the captions with.
        class_names: names of the C classes.
        templates: captions with ``{}`` in place of the class name.
        stores, progress: as in `zero_shot`.
    """
    names = {name: place for place, name in enumerate(dict.fromkeys(class_names))}
    captions = [template.format(name) for name in names for template in templates]
    store = resumable(stores, embedder, captions)
    features = text_features(embedder, captions, store=store, progress=progress)
    # Computed per name, not per class: classes of the same name in different batches could round differently.
    means = mean_directions(features.unflatten(0, (len(names), len(templates))))
    return means[[names[name] for name in class_names]]


def class_accuracies(answers: ZeroShot, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """List the accuracy of every class.

    Args:
        answers: the result of `zero_shot`.
        class_names: names of the source's classes.

    Returns:
        One dictionary per class with its ``name``, the number of ``images``, ``acc1`` (None without images), and
        ``taken_for``, the wrong classes that its images are most often assigned to.
    """
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
