"""Numbers of the papers, in per cent, to print beside a run's.

Sources: Radford et al. 2021 (CLIP, ViT-L/14 at 336 pixels), Jia et al. 2021 (ALIGN), Yuan et al. 2021 (Florence).
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["MEAN_PER_CLASS", "TOP1", "top1", "top1_dataset"]

_DATASETS = (
    *("food101", "cifar10", "cifar100", "sun397", "cars", "aircraft"),
    *("voc2007", "dtd", "pets", "caltech101", "flowers", "imagenet"),
)

# Classification, by system and data set. "CLIP" and "Florence" are zero-shot; what the tables call fine-tuned is a
# linear probe for CLIP (table 10 of its paper) and, ImageNet aside, for Florence, and the whole model for ALIGN.
TOP1: dict[str, dict[str, float]] = {
    name: {dataset: value for dataset, value in zip(_DATASETS, values) if value is not None}
    for name, values in {
        "CLIP": (93.8, 95.7, 77.5, 68.4, 78.8, 37.2, 84.3, 55.7, 93.5, 92.8, 78.3, 76.2),
        "Florence": (95.1, 94.6, 77.6, 77.0, 93.2, 55.5, 85.5, 66.4, 95.9, 94.7, 86.2, 83.7),
        "CLIP fine-tuned": (95.9, 97.9, 87.4, 82.2, 91.5, 71.6, 89.9, 83.0, 95.1, 96.0, 99.2, 85.4),
        "ALIGN fine-tuned": (95.9, None, None, None, 96.1, None, None, None, 96.2, None, None, 88.6),
        "Florence fine-tuned": (96.2, 97.6, 87.1, 84.2, 95.7, 83.9, 90.5, 86.0, 96.4, 96.6, 99.7, 90.1),
    }.items()
}

# Of these CLIP's paper reports the mean over classes (table 9), and VOC2007's mean average precision; else top-1.
MEAN_PER_CLASS = frozenset({"aircraft", "pets", "caltech101", "flowers"})


def top1(dataset: str) -> dict[str, float]:
    """Of `TOP1`, by system; ValueError for a data set that it does not have."""
    if dataset not in _DATASETS:
        raise ValueError(f"there are no published numbers of {dataset!r}, but of {', '.join(_DATASETS)}")
    return {name: values[dataset] for name, values in TOP1.items() if dataset in values}


def top1_dataset(path: str) -> str | None:
    """Which of `TOP1`'s a folder is called after, itself or one that it lies in."""
    return next((part.lower() for part in reversed(Path(path).parts) if part.lower() in _DATASETS), None)
