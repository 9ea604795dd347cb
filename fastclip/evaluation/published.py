"""Results that papers report, to put beside a model's own.

CLIP is the ViT-L/14 at 336 pixels of Radford et al. 2021 ("Learning Transferable Visual Models From Natural Language
Supervision"), ALIGN the EfficientNet-L2 with BERT-large of Jia et al. 2021 ("Scaling Up Visual and Vision-Language
Representation Learning With Noisy Text Supervision"), Florence the CoSwin-H of Yuan et al. 2021 ("Florence: A New
Foundation Model for Computer Vision").
"""

from __future__ import annotations

__all__ = ["RETRIEVAL"]


def _recalls(of_images: tuple[float, float], of_texts: tuple[float, float]) -> dict[str, float]:
    texts = {f"text_retrieval_recall@{k}": value for k, value in zip((1, 5), of_images)}
    return texts | {f"image_retrieval_recall@{k}": value for k, value in zip((1, 5), of_texts)}


# Zero-shot, in per cent, on Karpathy's test splits: 1,000 pictures of Flickr30K, 5,000 of COCO.
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
