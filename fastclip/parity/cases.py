"""The batches that are compared."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.system.rounding import ceil_div

__all__ = ["Case", "cases"]

SCALE, SIGMOID = 14.25, (10.0, -10.0)  # exact in every dtype


class Case(NamedTuple):
    """A whole batch in float64, and its distribution over the ranks."""

    name: str
    image: Tensor  # (M, D)
    text: Tensor  # (N, D)
    images: list[int]  # number of images on every rank
    texts: list[int]
    options: dict[str, Any]
    labels: tuple[Tensor, Tensor] | None = None
    scalars: tuple[float, ...] = (SCALE,)  # the sigmoid loss has a bias too

    @property
    def equal(self) -> bool:
        return len(set(self.images)) == len(set(self.texts)) == 1


def cases(ranks: int, batch: int, dim: int, seed: int) -> list[Case]:
    """Return the batches to compare, which are the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    same = [batch] * ranks
    uneven = [0 if ranks > 2 and r == 1 else batch - r * batch // (ranks + 1) for r in range(ranks)]

    def features(images: list[int], texts: list[int]) -> tuple[Tensor, Tensor, list[int], list[int]]:
        """Return features. Alternate texts are their image plus noise, so that some rows are peaked and others flat."""
        M, N = sum(images), sum(texts)
        image, text = (torch.randn(n, dim, dtype=torch.float64, generator=generator) for n in (M, N))
        text[: min(M, N) : 2] = image[: min(M, N) : 2] + 0.5 * text[: min(M, N) : 2]
        return image, text, images, texts

    more = [n + n // 4 for n in same]
    M, N, classes = sum(same), sum(more), max(sum(same) // 3, 2)
    # Each class occurs about three times among the images and among the texts, on several ranks. A quarter of the
    # classes occur on one side only.
    labels = torch.arange(M) % classes, torch.arange(N) % classes + classes // 4
    twins = torch.arange(M) % ceil_div(M, 2)
    image, text = features(same, same)[:2]
    unit = F.normalize(image), F.normalize(text)
    batches = [
        Case("plain", *features(same, same), {}),
        Case("labels, M != N", *features(same, more), {}, labels),
        Case("label_smoothing, image_weight", *features(same, same), {"label_smoothing": 0.1, "image_weight": 0.75}),
        Case("exclude_self", *features(same, same), {"exclude_self": True}, (twins, twins)),
        Case("reduction=sum", *features(same, same), {"reduction": "sum"}),
        Case("reduction=none", *features(same, same), {"reduction": "none"}),
        Case("normalize=False", *unit, same, same, {"normalize": False}),
        Case("sigmoid", *features(same, same), {}, scalars=SIGMOID),
    ]
    if ranks > 1:
        y = torch.arange(sum(uneven)) % classes, (torch.arange(sum(uneven)) + classes // 4) % (classes + 1)
        batches.append(Case("unequal shards", *features(uneven, uneven), {}))
        batches.append(Case("labels, unequal shards", *features(uneven, uneven), {}, y))
        batches.append(Case("sigmoid, unequal shards", *features(uneven, uneven), {}, scalars=SIGMOID))
    return batches
