"""The losses as modules with the constructors and forwards of open_clip, so that only an import line changes."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from fastclip.losses.contrastive import contrastive_loss
from fastclip.losses.distillation import contrastive_and_distillation
from fastclip.losses.sigmoid import sigmoid_loss

__all__ = ["ClipLoss", "DistillClipLoss", "SigLipLoss"]


class ClipLoss(nn.Module):
    """Drop-in for ``open_clip.loss.ClipLoss`` (3.3): same constructor, forward and ``output_dict``.

    As in open_clip, features must already be normalised, and the module never normalises them. ``cache_labels`` has no
    effect, because there is no label tensor to cache.

    With ``world_size > 1`` this is the loss over all ranks of `torch.distributed`'s default group, computed by
    `contrastive_loss` with ``group``. ``rank`` and ``world_size`` must match this group. Gradients are exact for
    every value of ``local_loss`` and ``gather_with_grad``. Value and gradients equal those of open_clip with
    ``local_loss=True, gather_with_grad=True``: each rank returns the mean loss of its images and texts, and the mean
    over ranks is the loss of the batch.

    open_clip's default flags (both False) give other gradients. With them, every rank returns the loss of the batch,
    but features receive gradients only from the loss of the rank that computed them. After DDP's mean the gradient of
    the encoders is 1 / world_size of the batch's gradient, while the gradient of logit_scale is complete. Retune a
    learning rate that was tuned with these flags if the optimiser depends on the size of gradients (SGD does, AdamW
    does not), and a threshold of gradient clipping in any case.

    The logits are never formed. A subclass that defines open_clip's ``get_logits`` or ``get_ground_truth``, which would
    never be called, is refused by forward with a TypeError: inherit from open_clip's class, or override forward.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod=True: Horovod is not supported, use torch.distributed (torchrun)")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Return the scalar loss, or ``{"contrastive_loss": loss}`` with ``output_dict``.

        image_features and text_features (N, D) must be normalised, and logit_scale exponentiated. A ``logit_bias`` adds
        the same number to all logits, which a softmax ignores: the loss is the same, and the gradient of the bias is 0.
        """
        _refuse_hooks(self, "ClipLoss", ("get_logits", "get_ground_truth"))
        return clip_loss(self, image_features, text_features, logit_scale, logit_bias, output_dict)


class DistillClipLoss(ClipLoss):
    """Drop-in for ``open_clip.loss.DistillClipLoss`` (3.3): same constructor, forward and ``output_dict``.

    The contrastive loss of a student, and the cross-entropy with the softmaxes of a frozen teacher of
    `distillation_loss`, computed in one pass. The teacher may have another D and dtype. Its features receive no
    gradient, while open_clip's class passes one on to features that require it.

    What `ClipLoss` says about features, flags, ranks and overridden methods holds here as well.
    """

    def forward(  # type: ignore[override]  # as in open_clip
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: float | Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Return the contrastive and the distillation loss, a pair or ``{"contrastive_loss": .., "distill_loss": ..}``.

        image_features and text_features (N, D), and the teacher's dist_image_features and dist_text_features (N, D_t),
        must be normalised, and both scales exponentiated.
        """
        _refuse_hooks(self, "DistillClipLoss", ("get_logits", "get_ground_truth", "dist_loss"))
        student = image_features, text_features, logit_scale
        teacher = dist_image_features, dist_text_features, dist_logit_scale
        return distill_clip_loss(self, *student, *teacher, output_dict=output_dict)


class SigLipLoss(nn.Module):
    """Drop-in for ``open_clip.loss.SigLipLoss`` (3.3): same constructor, forward and ``output_dict``.

    As in open_clip, features must already be normalised, and the module never normalises them. In open_clip,
    ``dist_impl`` ("bidir", "shift", "reduce" or "gather") and ``chunk_size`` choose between ways to compute the same
    loss. Here both are accepted, and the fused loss is computed in every case.

    With ``world_size > 1`` this is the loss over all ranks of `torch.distributed`'s default group, as in open_clip,
    computed by `sigmoid_loss` with ``group``. "bidir" and "shift", which pass texts from rank to rank, use
    ``comm="ring"``, the others ``comm="gather"``.

    A subclass that defines open_clip's ``get_logits``, ``get_ground_truth`` or ``_loss`` is refused by forward with a
    TypeError, for the reason given in `ClipLoss`.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        self.dist_impl = dist_impl or "bidir"
        if self.dist_impl not in _DIST_IMPLS:
            raise ValueError(f"dist_impl must be one of {', '.join(map(repr, _DIST_IMPLS))}, got {dist_impl!r}")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.chunk_size = chunk_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Return the scalar loss, or ``{"contrastive_loss": loss}`` with ``output_dict``.

        image_features and text_features (N, D) must be normalised, and logit_scale exponentiated. logit_bias is a
        number, a tensor of one element, or None for 0.
        """
        _refuse_hooks(self, "SigLipLoss", ("get_logits", "get_ground_truth", "_loss"))
        return siglip_loss(self, image_features, text_features, logit_scale, logit_bias, output_dict)


def clip_loss(
    module: Any,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    output_dict: bool = False,
) -> Tensor | dict[str, Tensor]:
    """Compute the forward of a ``ClipLoss``: `module` is fastclip's or open_clip's."""
    group = _world(module.rank, module.world_size)
    loss = contrastive_loss(image_features, text_features, logit_scale, normalize=False, group=group)
    assert isinstance(loss, Tensor)
    if isinstance(logit_bias, Tensor):
        loss = loss + 0.0 * logit_bias.sum()
    return {"contrastive_loss": loss} if output_dict else loss


def distill_clip_loss(
    module: Any,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    dist_image_features: Tensor,
    dist_text_features: Tensor,
    dist_logit_scale: float | Tensor,
    output_dict: bool = False,
) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
    """Compute the forward of a ``DistillClipLoss``: `module` is fastclip's or open_clip's."""
    losses = contrastive_and_distillation(
        (image_features, text_features, logit_scale),
        (dist_image_features, dist_text_features, dist_logit_scale),
        normalize=False,
        group=_world(module.rank, module.world_size),
    )
    return dict(zip(("contrastive_loss", "distill_loss"), losses)) if output_dict else losses


def siglip_loss(
    module: Any,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None,
    output_dict: bool = False,
) -> Tensor | dict[str, Tensor]:
    """Compute the forward of a ``SigLipLoss``: `module` is fastclip's or open_clip's."""
    bias = 0.0 if logit_bias is None else logit_bias
    group = _world(module.rank, module.world_size)
    comm = "ring" if module.dist_impl in ("bidir", "shift") else "gather"
    loss = sigmoid_loss(image_features, text_features, logit_scale, bias, normalize=False, group=group, comm=comm)
    return {"contrastive_loss": loss} if output_dict else loss


def _refuse_hooks(module: nn.Module, name: str, hooks: tuple[str, ...]) -> None:
    """Raise TypeError if `module` defines one of `hooks`, which open_clip's forward calls and fastclip's does not."""
    for hook in hooks:
        if hasattr(type(module), hook) or hook in vars(module):
            raise TypeError(
                f"fastclip.{name} never forms the logits, so {type(module).__name__}.{hook} would not be called: "
                f"inherit from open_clip.loss.{name}, or override forward"
            )


_DIST_IMPLS = ("bidir", "shift", "reduce", "gather")


def _world(rank: int, world_size: int) -> Any:
    """Return the default process group, or None for one process."""
    if world_size == 1:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(f"world_size={world_size} needs torch.distributed: call init_process_group before the loss")
    if (dist.get_rank(), dist.get_world_size()) != (rank, world_size):
        raise ValueError(
            f"rank={rank}, world_size={world_size} do not match torch.distributed's default group: rank "
            f"{dist.get_rank()}, world size {dist.get_world_size()}"
        )
    return dist.group.WORLD
