"""Classification by class embeddings or by a classifier's scores: ranks, predictions and the metrics of both."""

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
_CHUNK = 2**24  # similarities at a time, 64 MiB of float32


def labelled(images: ImageFeatures, spec: str) -> ImageFeatures:
    """Return the pictures of `spec` that have a class; the log counts the others.

    Raises:
        ValueError: none has a class.
    """
    has_class = images.labels >= 0
    if not bool(has_class.any()):
        raise ValueError(f"{spec}: none of the pictures has a class")
    if missing := int((~has_class).sum()):
        logger.warning("%s: %d pictures without a class are left out", spec, missing)
    return ImageFeatures(*(part[has_class] for part in images))


def mean_directions(features: Tensor) -> Tensor:
    """(C, T, D) -> unit vectors (C, D): the means of unit vectors, made unit vectors again."""
    return F.normalize(features.mean(dim=1), dim=-1)


def class_ranks(features: Tensor, classes: Tensor, labels: Tensor, class_names: Sequence[str]) -> Tensor:
    """How many classes come before a picture's own, (K,) int64: 0 is a hit at 1.

    A class within 2^-20 of its own in the cosine comes before it: a tie counts against the model (`best_ranks`).
    Classes of the same name, such as the two "missile" and the two "sunglasses" in CLIP's list for ImageNet, differ in
    nothing that a model could tell; of them the first comes first, which is what an argmax gives.

    Args:
        features: (K, D) of the pictures.
        classes: (C, D), the class embeddings.
        labels: (K,) int64, below C.
    """
    namesakes = _namesakes(class_names, labels.device)[labels]
    picture, column = (namesakes >= 0).nonzero(as_tuple=True)
    # all namesakes belong to the picture, as rounding would decide which of their equal cosines is larger
    ranks = best_ranks(features, classes, torch.stack([picture, namesakes[picture, column]], dim=1))
    return ranks + _earlier(namesakes, labels)


def predicted_classes(
    features: Tensor, classes: Tensor, labels: Tensor, ranks: Tensor, class_names: Sequence[str]
) -> Tensor:
    """What a picture is taken for, (K,) int64: its own class where its rank (`class_ranks`) is 0, else another.

    Of several classes that are equally near, within 2^-20 in the cosine, the first is meant. Arguments as
    `class_ranks`'s; no K x C matrix is stored.
    """
    namesakes = _namesakes(class_names, labels.device)[labels]
    rows, strangers = max(1, _CHUNK // max(1, len(classes))), []
    classes = unit_rows(classes)
    for block, places in zip(unit_rows(features).split(rows), namesakes.split(rows)):
        similarities = block @ classes.T
        picture, column = (places >= 0).nonzero(as_tuple=True)
        similarities[picture, places[picture, column]] = -torch.inf
        strangers.append(first_best(similarities))
    # where only namesakes come before its class, the first of them is what an argmax takes
    others = torch.where(ranks == _earlier(namesakes, labels), namesakes[:, 0], torch.cat(strangers))
    return torch.where(ranks == 0, labels, others)


def _namesakes(class_names: Sequence[str], device: torch.device) -> Tensor:
    """Places of every class's namesakes, itself too, in order and filled up with -1, (C, most) int64."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(class_names):
        places.setdefault(name, []).append(place)
    most = max(map(len, places.values()))
    rows = [places[name] + [-1] * (most - len(places[name])) for name in class_names]
    return torch.tensor(rows, device=device)


def _earlier(namesakes: Tensor, labels: Tensor) -> Tensor:
    """How many of a picture's classes of one name stand before its own, (K,) int64."""
    return ((namesakes >= 0) & (namesakes < labels[:, None])).sum(1)


def score_ranks(scores: Tensor, labels: Tensor, *, size: float = 0.0) -> Tensor:
    """How many other classes score at least as high as a picture's own, (N,) int64; scores (N, C), labels (N,) int64.

    So a tie, and what is not a number, counts against the model. A score that is 2^-20 of `size` below ties too: of
    float32 products, such as those of two classes with one name, rounding decides which is larger.

    Args:
        size: what no score exceeds (`ImageClassifier.largest_score`).
    """
    least = least_alike(scores.gather(1, labels[:, None]), size)
    return (~(scores < least)).sum(1) - 1  # not `scores >= least`, which would let what is no number pass


def classification_metrics(ranks: Tensor, labels: Tensor, classes: int) -> dict[str, float | None]:
    """CLIP_benchmark's ``acc1``, ``acc5``, None with less than five classes, and ``mean_per_class_recall``.

    From 0 to 1. The last is scikit-learn's `balanced_accuracy_score`: the mean of acc1 over the classes with pictures.

    Args:
        ranks: (K,) int64, `class_ranks` or `score_ranks`.
        labels: (K,) int64, below `classes`.
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
    """`classification_metrics` of a classifier on the pictures of a source that can be used and have a class.

    Args:
        classifier: is put into eval mode.
        embedder: whose transform, precision and device are taken.

    Raises:
        ValueError: an empty source, no picture can be used, or its classes are not the classifier's.
        OSError, ValueError: what the samples are read from cannot be.
    """
    if tuple(source.class_names) != classifier.class_names:
        raise ValueError(f"{source.spec} has other classes than the classifier: {len(source.class_names)} of them")
    classifier.eval()
    skipped, device, size = Tally(), embedder.device, classifier.largest_score()
    ranks, labels = [], []
    batches = evaluation_batches(source, embedder.transform, batch_size=batch_size, workers=workers, skipped=skipped)
    with Progress(f"pictures of {source.spec}", len(source), shown=progress) as bar:
        for images, _, classes in batches:
            bar.moved(len(classes))
            has_class = classes >= 0
            with torch.autocast(device.type, torch.bfloat16, enabled=embedder.precision == "bf16"):
                scores = classifier(images.to(device))
            ranks.append(score_ranks(scores.cpu()[has_class], classes[has_class], size=size))
            labels.append(classes[has_class])
    used = sum(map(len, labels))
    if used < len(source):
        logger.warning("%s: %d of %d pictures are left out: %s", source.spec, len(source) - used, len(source), skipped)
    if not used:
        raise ValueError(f"{source.spec}: none of {len(source)} pictures can be used")
    return classification_metrics(torch.cat(ranks), torch.cat(labels), len(source.class_names))


def confusion(labels: Tensor, predictions: Tensor, classes: int) -> Tensor:
    """(C, C) int64: how many pictures of class i, the row, are taken for class j."""
    return (labels * classes + predictions).bincount(minlength=classes**2).view(classes, classes)


def mistakes(labels: Tensor, predictions: Tensor) -> Tensor:
    """(P, 3) int64: a class, another that it is taken for, and how many pictures are; the most frequent first.

    No C x C matrix is stored.
    """
    pairs, counts = torch.stack([labels, predictions], dim=1)[labels != predictions].unique(dim=0, return_counts=True)
    order = counts.argsort(descending=True, stable=True)  # of as many, the first class leads on every processor
    return torch.cat([pairs, counts[:, None]], dim=1)[order]
