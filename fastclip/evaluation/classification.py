"""Ranks, predictions and metrics of classification by class embeddings or by the scores of a classifier."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.data.faults import Tally
from fastclip.data.loading.batches import evaluation_batches
from fastclip.data.source import Source
from fastclip.embedding.features import ImageFeatures
from fastclip.evaluation.retrieval import best_ranks, first_best, least_alike, recall, unit_rows
from fastclip.models.classifier import ImageClassifier
from fastclip.models.embedder import Embedder
from fastclip.system.progress import Progress

__all__ = [
    "class_ranks",
    "classification_metrics",
    "classifier_accuracies",
    "confusion",
    "labelled",
    "mean_directions",
    "mistakes",
    "predicted_classes",
    "score_ranks",
]

logger = logging.getLogger(__name__)
_CHUNK = 2**24  # similarities per block, 64 MiB of float32


def labelled(images: ImageFeatures, spec: str) -> ImageFeatures:
    """Return only the images that have a class, and log the number of the others.

    Args:
        images: features of images.
        spec: name of the dataset in messages.

    Raises:
        ValueError: no image has a class.
    """
    has_class = images.labels >= 0
    if not bool(has_class.any()):
        raise ValueError(f"{spec}: none of the images has a class")
    if missing := int((~has_class).sum()):
        logger.warning("%s: %d images without a class are left out", spec, missing)
    return ImageFeatures(*(part[has_class] for part in images))


def mean_directions(features: Tensor) -> Tensor:
    """Return the means of unit vectors over their second dimension, normalised again: (C, T, D) -> (C, D)."""
    return F.normalize(features.mean(dim=1), dim=-1)


def class_ranks(features: Tensor, classes: Tensor, labels: Tensor, class_names: Sequence[str]) -> Tensor:
    """Return the rank of each image's true class, (K,) int64: the number of classes that come before it.

    An image of rank 0 counts as correct in top-1. A class comes before the true class unless its cosine is smaller by
    more than 2^-20, so that ties count against the model (`best_ranks`). Classes of the same name, such as the two
    "missile" and the two "sunglasses" in CLIP's list for ImageNet, cannot be distinguished by any model. They are
    ordered by index, so that the first one is predicted, as with argmax.

    Args:
        features: features of the images, (K, D).
        classes: class embeddings, (C, D).
        labels: true classes, (K,) int64, each below C.
        class_names: names of the C classes.
    """
    namesakes = _namesakes(class_names, labels.device)[labels]
    picture, column = (namesakes >= 0).nonzero(as_tuple=True)
    # All classes of the same name are treated as belonging to the image: in exact arithmetic their cosines are equal,
    # and rounding would otherwise decide which of them is larger.
    ranks = best_ranks(features, classes, torch.stack([picture, namesakes[picture, column]], dim=1))
    return ranks + _earlier(namesakes, labels)


def predicted_classes(
    features: Tensor, classes: Tensor, labels: Tensor, ranks: Tensor, class_names: Sequence[str]
) -> Tensor:
    """Return the predicted class of each image, (K,) int64, consistent with its rank.

    The prediction is the true class if its rank (`class_ranks`) is 0, and another class otherwise. Among classes whose
    cosines are equal to within 2^-20, the first is predicted. No K x C matrix is stored.

    Args:
        features, classes, labels, class_names: as in `class_ranks`.
        ranks: the result of `class_ranks`, (K,) int64.
    """
    namesakes = _namesakes(class_names, labels.device)[labels]
    rows, strangers = max(1, _CHUNK // max(1, len(classes))), []
    classes = unit_rows(classes)
    for block, places in zip(unit_rows(features).split(rows), namesakes.split(rows)):
        similarities = block @ classes.T
        picture, column = (places >= 0).nonzero(as_tuple=True)
        similarities[picture, places[picture, column]] = -torch.inf
        strangers.append(first_best(similarities))
    # If only classes of the same name come before the true class, an argmax takes the first of them.
    others = torch.where(ranks == _earlier(namesakes, labels), namesakes[:, 0], torch.cat(strangers))
    return torch.where(ranks == 0, labels, others)


def _namesakes(class_names: Sequence[str], device: torch.device) -> Tensor:
    """Return the indices of all classes with the same name as each class, in order, padded with -1: (C, most) int64."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(class_names):
        places.setdefault(name, []).append(place)
    most = max(map(len, places.values()))
    rows = [places[name] + [-1] * (most - len(places[name])) for name in class_names]
    return torch.tensor(rows, device=device)


def _earlier(namesakes: Tensor, labels: Tensor) -> Tensor:
    """Count the classes with the same name and a lower index than the true class of each image, (K,) int64."""
    return ((namesakes >= 0) & (namesakes < labels[:, None])).sum(1)


def score_ranks(scores: Tensor, labels: Tensor, *, size: float = 0.0) -> Tensor:
    """Return the number of other classes that score at least as high as each image's true class, (N,) int64.

    Ties and NaN count against the model. Scores are tied if they differ by at most 2^-20 of `size`, because products
    that are equal in exact arithmetic, such as those of two classes with the same name, may differ by rounding in
    float32.

    Args:
        scores: (N, C) float.
        labels: true classes, (N,) int64.
        size: upper bound of the scores (`ImageClassifier.largest_score`).
    """
    least = least_alike(scores.gather(1, labels[:, None]), size)
    return (~(scores < least)).sum(1) - 1  # `scores >= least` would be False for NaN, in favour of the model


def classification_metrics(ranks: Tensor, labels: Tensor, classes: int) -> dict[str, float | None]:
    """Return CLIP_benchmark's metrics ``acc1``, ``acc5`` and ``mean_per_class_recall``, each from 0 to 1.

    ``acc5`` is None with fewer than five classes. ``mean_per_class_recall`` is the mean of acc1 over all classes that
    have images, which equals scikit-learn's `balanced_accuracy_score`.

    Args:
        ranks: ranks of the true classes, (K,) int64, from `class_ranks` or `score_ranks`.
        labels: true classes, (K,) int64, each below `classes`.
        classes: number of classes.
    """
    pictures = labels.bincount(minlength=classes)
    hits = labels[ranks == 0].bincount(minlength=classes)
    recalls = hits[pictures > 0].double() / pictures[pictures > 0]
    return {
        "acc1": recall(ranks, 1),
        "acc5": recall(ranks, 5) if classes >= 5 else None,
        "mean_per_class_recall": float(recalls.mean()),
    }


@torch.no_grad()
def classifier_accuracies(
    classifier: ImageClassifier,
    embedder: Embedder,
    source: Source,
    *,
    batch_size: int = 256,
    workers: int = 0,
    progress: bool = False,
) -> dict[str, float | None]:
    """Evaluate a classifier on all images of a source that can be used and have a class.

    Args:
        classifier: the classifier, which is put into eval mode.
        embedder: source of the image transform, the precision and the device.
        source: dataset with the classifier's classes.
        batch_size, workers, progress: as in `image_features`.

    Returns:
        The `classification_metrics`.

    Raises:
        ValueError: the source is empty or damaged, no image can be used, or its classes differ from the classifier's.
        OSError: a file of the source cannot be read.
    """
    if tuple(source.class_names) != classifier.class_names:
        raise ValueError(f"{source.spec} has other classes than the classifier ({len(source.class_names)} classes)")
    classifier.eval()
    skipped, device, size = Tally(), embedder.device, classifier.largest_score()
    ranks, labels = [], []
    batches = evaluation_batches(
        source, embedder.pixel_transform, batch_size=batch_size, workers=workers, skipped=skipped
    )
    with Progress(f"images of {source.spec}", len(source), shown=progress) as bar:
        for images, _, classes in batches:
            bar.moved(len(classes))
            has_class = classes >= 0
            images = embedder.normalized(images)
            with torch.autocast(device.type, torch.bfloat16, enabled=embedder.precision == "bf16"):
                scores = classifier(images)
            ranks.append(score_ranks(scores.cpu()[has_class], classes[has_class], size=size))
            labels.append(classes[has_class])
    used = sum(map(len, labels))
    if used < len(source):
        logger.warning("%s: %d of %d images are left out: %s", source.spec, len(source) - used, len(source), skipped)
    if not used:
        raise ValueError(f"{source.spec}: none of {len(source)} images can be used")
    return classification_metrics(torch.cat(ranks), torch.cat(labels), len(source.class_names))


def confusion(labels: Tensor, predictions: Tensor, classes: int) -> Tensor:
    """Return the confusion matrix (C, C) int64: element (i, j) counts the images of class i predicted as class j."""
    return (labels * classes + predictions).bincount(minlength=classes**2).view(classes, classes)


def mistakes(labels: Tensor, predictions: Tensor) -> Tensor:
    """Return the wrong predictions, most frequent first, as rows (true class, predicted class, images): (P, 3) int64.

    No C x C matrix is stored.
    """
    pairs, counts = torch.stack([labels, predictions], dim=1)[labels != predictions].unique(dim=0, return_counts=True)
    order = counts.argsort(descending=True, stable=True)  # a stable sort gives the same order on every processor
    return torch.cat([pairs, counts[:, None]], dim=1)[order]
