"""Classification by class embeddings: ranks, predictions and the metrics of both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.evaluation.retrieval import best_ranks, first_best, recall, unit_rows

__all__ = ["class_ranks", "classification_metrics", "confusion", "mean_directions", "predicted_classes"]

_CHUNK = 2**24  # similarities at a time, 64 MiB of float32


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
    same = _namesakes(class_names, labels.device)[labels]
    picture, column = (same >= 0).nonzero(as_tuple=True)
    ranks = best_ranks(features, classes, torch.stack([picture, same[picture, column]], dim=1))
    return ranks + ((same >= 0) & (same < labels[:, None])).sum(1)


def predicted_classes(
    features: Tensor, classes: Tensor, labels: Tensor, ranks: Tensor, class_names: Sequence[str]
) -> Tensor:
    """What a picture is taken for, (K,) int64: its own class where its rank (`class_ranks`) is 0, else another.

    Of several classes that are equally near, within 2^-20 in the cosine, the first is meant. Arguments as
    `class_ranks`'s; no K x C matrix is stored.
    """
    same = _namesakes(class_names, labels.device)[labels]
    rows, found = max(1, _CHUNK // max(1, len(classes))), []
    classes = unit_rows(classes)
    for block, twins in zip(unit_rows(features).split(rows), same.split(rows)):
        similarities = block @ classes.T
        picture, column = (twins >= 0).nonzero(as_tuple=True)
        similarities[picture, twins[picture, column]] = -torch.inf
        found.append(first_best(similarities))
    earlier = ((same >= 0) & (same < labels[:, None])).sum(1)
    others = torch.where(ranks == earlier, same[:, 0], torch.cat(found))  # none but its namesakes come before it
    return torch.where(ranks == 0, labels, others)


def _namesakes(class_names: Sequence[str], device: torch.device) -> Tensor:
    """Of every class the places of those of its name in order, itself too, (C, most), filled up with -1; int64."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(class_names):
        places.setdefault(name, []).append(place)
    most = max(map(len, places.values()))
    rows = [places[name] + [-1] * (most - len(places[name])) for name in class_names]
    return torch.tensor(rows, device=device)


def classification_metrics(ranks: Tensor, labels: Tensor, classes: int) -> dict[str, float | None]:
    """CLIP_benchmark's ``acc1``, ``acc5``, None with less than five classes, and ``mean_per_class_recall``.

    From 0 to 1. The last is scikit-learn's `balanced_accuracy_score`: the mean of acc1 over the classes with pictures.

    Args:
        ranks: (K,) int64, `class_ranks`.
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


def confusion(labels: Tensor, predictions: Tensor, classes: int) -> Tensor:
    """(C, C) int64: how many pictures of class i, the row, are taken for class j."""
    return (labels * classes + predictions).bincount(minlength=classes**2).view(classes, classes)
