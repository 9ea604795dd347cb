"""Distillation in a training step: frozen teachers embed the batch of the student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.losses.distillation import contrastive_and_distillation, distillation_loss
from fastclip.models.dual_encoder import DualEncoder
from fastclip.models.transforms import PixelNormalization
from fastclip.training.step.micro_batches import MicroBatch, TextOrder

__all__ = ["Distillation", "Taught", "Teacher"]


class Teacher:
    """A frozen model that embeds the micro-batches of a student.

    Args:
        path: path of its checkpoint, for messages.
        model: model on the student's device. It is put into eval mode, and its parameters get no gradients.
        digest: digest of its weights and configuration.
    """

    def __init__(self, path: str, model: DualEncoder, digest: str = "") -> None:
        assert model.config is not None
        self.path, self.model, self.digest = path, model.eval().requires_grad_(False), digest
        self._side = model.config.vision_cfg.image_size
        self._normalize_pixels = PixelNormalization.of(model.config)

    def __call__(self, pixels: Tensor, ids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the features (B, D_t) of uint8 pixels (B, 3, S, S) and of token ids, not normalised."""
        images = self._normalize_pixels(resized(pixels, self._side))
        return self.model.encode_image(images), self.model.encode_text(ids)


class Taught(NamedTuple):
    """Features (N, D_t) and scales () of the batch of a process, one element for each teacher."""

    images: list[Tensor]
    texts: list[Tensor]
    scales: list[Tensor]

    def to(self, device: torch.device) -> Taught:
        return Taught(*([x.to(device) for x in part] for part in self))


class Distillation:
    """Sum of the contrastive loss and `weight` times the distillation loss.

    Args:
        teachers: frozen teachers.
        weight: weight of the distillation loss.
        plain: the contrastive loss is that of `fastclip.contrastive_loss` without options, which the statistics of the
            distillation loss already give.
        group, equal_shards, backend: arguments of `fastclip.distillation_loss`.
        autocast: dtype in which the teachers compute (None: the dtype of the weights).
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        *,
        weight: float = 1.0,
        plain: bool = False,
        group: Any = None,
        equal_shards: bool = False,
        backend: str | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.teachers, self.weight, self._plain, self._autocast = tuple(teachers), weight, plain, autocast
        self._shared: dict[str, Any] = {"group": group, "equal_shards": equal_shards, "backend": backend}

    @torch.no_grad()
    def embed(self, pieces: Sequence[MicroBatch], text_order: TextOrder) -> Taught:
        """Embed the micro-batches of a process by all teachers, one micro-batch at a time.

        The texts are those of the student, cut like them: padding influences no feature.
        """
        taught = Taught([], [], [])
        for teacher in self.teachers:
            scale = teacher.model.logit_scale
            with torch.autocast(scale.device.type, self._autocast, enabled=self._autocast is not None):
                features = [teacher(*piece.arguments()) for piece in pieces]
            image, text = (torch.cat(parts) for parts in zip(*features))
            taught.images.append(image)
            taught.texts.append(text_order.in_batch_order(text))
            taught.scales.append(scale.exp())
        return taught

    def losses(
        self, student: tuple[Tensor, Tensor, Tensor], taught: Taught, contrastive: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the contrastive loss () and the distillation loss (), which is not yet weighted.

        Args:
            student: features of the images (N, D) and of the texts (N, D) of this process, and the scale ().
            taught: result of `embed` for the same pairs.
            contrastive: function that computes the contrastive loss.
        """
        teachers = taught.to(student[0].device)
        if self._plain:
            return contrastive_and_distillation(student, teachers, normalize=True, **self._shared)
        distillation = distillation_loss(*student, *teachers, **self._shared)
        assert isinstance(distillation, Tensor)
        return contrastive(), distillation


def resized(pixels: Tensor, side: int) -> Tensor:
    """Return uint8 pixels (B, 3, S, S) in the size of another model (B, 3, `side`, `side`): bicubic, antialiased."""
    if pixels.shape[-2:] == (side, side):
        return pixels
    assert pixels.dtype == torch.uint8, "only pixels that are not yet normalised can be resized for another model"
    wide = F.interpolate(pixels.float(), size=(side, side), mode="bicubic", antialias=True)
    return wide.round_().clamp_(0, 255).to(torch.uint8)
