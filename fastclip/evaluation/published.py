"""Published results of CLIP, ALIGN and Florence in per cent, for comparison with a model's results.

- CLIP: ViT-L/14 with images of 336 pixels. Radford et al. 2021, "Learning Transferable Visual Models From Natural
  Language Supervision".
- ALIGN: EfficientNet-L2 with BERT-large. Jia et al. 2021, "Scaling Up Visual and Vision-Language Representation
  Learning With Noisy Text Supervision".
- Florence: CoSwin-H. Yuan et al. 2021, "Florence: A New Foundation Model for Computer Vision".
"""

from __future__ import annotations

from pathlib import Path

from fastclip.data.sources.classes import SPLITS

__all__ = ["MEAN_PER_CLASS", "RETRIEVAL", "TOP1", "ZERO_SHOT", "top1", "top1_dataset"]

# Zero-shot top-1, under CLIP_benchmark's names of the datasets. Source: table 4 of Jia et al. 2021; for Florence,
# table 1 of Yuan et al. 2021.
ZERO_SHOT: dict[str, dict[str, float]] = {
    "CLIP": {"imagenet1k": 76.2, "imagenet-r": 88.9, "imagenet-a": 77.2, "imagenetv2": 70.1},
    "ALIGN": {"imagenet1k": 76.4, "imagenet-r": 92.2, "imagenet-a": 75.8, "imagenetv2": 70.1},
    "Florence": {"imagenet1k": 83.7},
}


def _recalls(of_images: tuple[float, float], of_texts: tuple[float, float]) -> dict[str, float]:
    texts = {f"text_retrieval_recall@{k}": value for k, value in zip((1, 5), of_images)}
    return texts | {f"image_retrieval_recall@{k}": value for k, value in zip((1, 5), of_texts)}


# Zero-shot recall in per cent on Karpathy's test splits: 1,000 images of Flickr30K, 5,000 images of COCO
RETRIEVAL = {
    "flickr30k": {
        "CLIP": _recalls((88.0, 98.7), (68.7, 90.6)),
        "ALIGN": _recalls((88.6, 98.7), (75.7, 93.8)),
        "Florence": _recalls((90.9, 99.1), (76.7, 93.6)),
    },
    "coco": {
        "CLIP": _recalls((58.4, 81.5), (37.8, 62.4)),
        "ALIGN": _recalls((58.6, 83.0), (45.6, 69.8)),
        "Florence": _recalls((64.7, 85.9), (47.2, 71.4)),
    },
}

_DATASETS = (
    *("food101", "cifar10", "cifar100", "sun397", "cars", "aircraft"),
    *("voc2007", "dtd", "pets", "caltech101", "flowers", "imagenet"),
)

# Classification accuracy of each model on each dataset. "CLIP" and "Florence" are zero-shot. The row "CLIP
# fine-tuned" is a linear probe (table 10 of CLIP's paper).
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

# Datasets for which CLIP's paper reports the mean over classes (table 9). For VOC2007 it reports the mean average
# precision, and for all others top-1.
MEAN_PER_CLASS = frozenset({"aircraft", "pets", "caltech101", "flowers"})


def top1(dataset: str) -> dict[str, float]:
    """Return the published accuracies (`TOP1`) on a dataset, in per cent by model.

    Raises:
        ValueError: there are no published results for the dataset.
    """
    if dataset not in _DATASETS:
        raise ValueError(f"there are no published results for {dataset!r}: choose one of {', '.join(_DATASETS)}")
    return {name: values[dataset] for name, values in TOP1.items() if dataset in values}


def top1_dataset(path: str) -> str | None:
    """Return the dataset of `TOP1` that a folder is named after, or None.

    For the folder of a split, such as ``pets/test``, the name of its parent counts.
    """
    folder = Path(path)
    name = (folder.parent if folder.name.lower() in SPLITS else folder).name.lower()
    return name if name in _DATASETS else None
