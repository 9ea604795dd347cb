"""Accuracy of classifiers that give every class a score."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from fastclip.data.faults import Tally
from fastclip.data.loader import evaluation_batches
from fastclip.data.source import Source
from fastclip.evaluation.classification import classification_metrics
from fastclip.evaluation.progress import Progress
from fastclip.evaluation.retrieval import least_alike
from fastclip.models.classifier import ImageClassifier
from fastclip.models.embedder import Embedder

__all__ = ["classifier_accuracies", "score_ranks"]

logger = logging.getLogger(__name__)


def score_ranks(scores: Tensor, labels: Tensor, *, size: float = 0.0) -> Tensor:
    """How many other classes score at least as high as a picture's own, (N,) int64; scores (N, C), labels (N,) int64.

    So a tie, and what is not a number, counts against the model. A score that is 2^-20 of `size` below ties too: of
    float32 products, such as those of two classes with one name, rounding decides which is larger.

    Args:
        size: what no score exceeds (`ImageClassifier.largest_score`).
    """
    own = least_alike(scores.gather(1, labels[:, None]), size)
    return (~(scores < own)).sum(1) - 1


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
            some = classes >= 0
            with torch.autocast(device.type, torch.bfloat16, enabled=embedder.precision == "bf16"):
                scores = classifier(images.to(device))
            ranks.append(score_ranks(scores.cpu()[some], classes[some], size=size))
            labels.append(classes[some])
    whole = torch.cat(labels)
    if len(whole) < len(source):
        logger.warning(
            "%s: %d of %d pictures are left out: %s", *(source.spec, len(source) - len(whole)), len(source), skipped
        )
    if not len(whole):
        raise ValueError(f"{source.spec}: none of {len(source)} pictures can be used")
    return classification_metrics(torch.cat(ranks), whole, len(source.class_names))
