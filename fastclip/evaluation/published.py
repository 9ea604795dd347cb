"""Results of other systems, to put beside a run's; per cent, by CLIP_benchmark's names of data sets.

Sources: CLIP, Radford et al. 2021; ALIGN, Jia et al. 2021; Florence, Yuan et al. 2021.
"""

from __future__ import annotations

__all__ = ["ZERO_SHOT"]

# Zero-shot top-1: CLIP ViT-L/14@336px and ALIGN by table 4 of Jia et al. 2021, Florence by table 1 of Yuan et al. 2021.
ZERO_SHOT: dict[str, dict[str, float]] = {
    "CLIP": {"imagenet1k": 76.2, "imagenet-r": 88.9, "imagenet-a": 77.2, "imagenetv2": 70.1},
    "ALIGN": {"imagenet1k": 76.4, "imagenet-r": 92.2, "imagenet-a": 75.8, "imagenetv2": 70.1},
    "Florence": {"imagenet1k": 83.7},
}
