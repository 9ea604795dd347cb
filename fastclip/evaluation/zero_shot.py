"""Zero-shot classification: an image gets the class whose captions it is closest to.

The model is used in the mode it is in: call ``model.eval()`` first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.models.dual_encoder import DualEncoder

__all__ = ["class_embeddings", "mean_directions", "zero_shot_accuracy", "zero_shot_similarities"]


@torch.no_grad()
def class_embeddings(
    model: DualEncoder, tokenize: Callable[[list[str]], Tensor], class_names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """One unit vector a class, (C, D): the mean of the normalised features of its captions, normalised again.

    Radford et al. 2021, section 3.1.4. ``templates`` hold ``{}`` in place of the class name.
    """
    device = model.logit_scale.device
    captions = [template.format(name) for name in class_names for template in templates]
    features = model.encode_text(tokenize(captions).to(device), normalize=True)
    return mean_directions(features.view(len(class_names), len(templates), -1))


def mean_directions(features: Tensor) -> Tensor:
    """(C, T, D) -> unit vectors (C, D): the means of unit vectors, made unit vectors again."""
    return F.normalize(features.mean(dim=1), dim=-1)


@torch.no_grad()
def zero_shot_similarities(model: DualEncoder, images: Tensor, classes: Tensor, *, batch_size: int = 256) -> Tensor:
    """Cosines (B, C) of images (B, C, H, W) and class embeddings (C, D)."""
    device = model.logit_scale.device
    features = [model.encode_image(chunk.to(device), normalize=True) for chunk in images.split(batch_size)]
    return torch.cat(features) @ classes.T


def zero_shot_accuracy(
    model: DualEncoder, images: Tensor, labels: Tensor, classes: Tensor, *, batch_size: int = 256
) -> float:
    """Share, 0 to 1, of the images (B, C, H, W) whose most similar class (C, D) is their label (B,)."""
    similarities = zero_shot_similarities(model, images, classes, batch_size=batch_size)
    return float((similarities.argmax(dim=1) == labels.to(similarities.device)).float().mean())
