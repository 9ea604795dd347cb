"""Metrics of classification."""

from __future__ import annotations

from torch import Tensor

from fastclip.evaluation.retrieval import recall

__all__ = ["classification_metrics"]


def classification_metrics(ranks: Tensor, labels: Tensor, classes: int) -> dict[str, float | None]:
    """CLIP_benchmark's ``acc1``, ``acc5``, None with less than five classes, and ``mean_per_class_recall``.

    From 0 to 1. The last is scikit-learn's `balanced_accuracy_score`: the mean of acc1 over the classes with pictures.

    Args:
        ranks: (K,) int64, how many classes come before a picture's own.
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
