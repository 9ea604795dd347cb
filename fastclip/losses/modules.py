"""The losses as modules with open_clip's constructors and forwards: one import line changes."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from fastclip.losses.contrastive import contrastive_loss
from fastclip.losses.sigmoid import sigmoid_loss

__all__ = ["ClipLoss", "SigLipLoss"]


class ClipLoss(nn.Module):
    """Drop-in for ``open_clip.loss.ClipLoss`` (3.3): same constructor, forward and ``output_dict``.

    Like open_clip's it takes features that are already normalised, and never normalises them. ``cache_labels`` has
    nothing to do here: there is no label tensor to cache.

    With ``world_size > 1`` it is the loss over all ranks of `torch.distributed`'s default group, whose rank and size
    the arguments must be, always with exact gradients: `contrastive_loss` with ``group``, whatever ``local_loss`` and
    ``gather_with_grad`` say. That is open_clip's ``local_loss=True, gather_with_grad=True`` in value and gradients: a
    rank's value is its own images' and texts' mean loss, and the mean over ranks is the batch's.

    open_clip's default flags differ: there every rank returns the batch's loss, and features have gradients on their
    own rank only, so that after DDP's mean the encoders' gradient is 1 / world_size of the batch's, while logit_scale's
    is whole. A learning rate or a clipping threshold that was tuned for that, with an optimiser that sees a gradient's
    size (SGD; not AdamW), has to be looked at again.

    The logits are never formed. A subclass that has open_clip's ``get_logits`` or ``get_ground_truth``, which would not
    be called, is refused by this forward with a TypeError: inherit from open_clip's class, or override forward.
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
            raise ValueError("use_horovod=True: Horovod is not supported, torch.distributed is (torchrun)")
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
        """image_features, text_features (N, D), already normalised; logit_scale already exponentiated.

        Returns the scalar loss, or ``{"contrastive_loss": loss}`` with ``output_dict``. A ``logit_bias`` shifts all
        logits alike, which a softmax does not see: the loss is the same and its gradient is 0.
        """
        _refuse_hooks(self, "ClipLoss", ("get_logits", "get_ground_truth"))
        return clip_loss(self, image_features, text_features, logit_scale, logit_bias, output_dict)


class SigLipLoss(nn.Module):
    """Drop-in for ``open_clip.loss.SigLipLoss`` (3.3): same constructor, forward and ``output_dict``.

    Like open_clip's it takes features that are already normalised, and never normalises them. ``dist_impl`` ("bidir",
    "shift", "reduce", "gather") and ``chunk_size`` choose between ways to the same loss: they are accepted, and the
    fused path, which is all of them at once, is taken. With ``world_size > 1`` it is the loss over all ranks of
    `torch.distributed`'s default group, as open_clip's: `sigmoid_loss` with ``group``; "bidir" and "shift", which pass
    texts from rank to rank, take ``comm="ring"``. A subclass with open_clip's ``get_logits``, ``get_ground_truth`` or
    ``_loss`` is refused with a TypeError, as `ClipLoss` refuses them.
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
        """image_features, text_features (N, D), already normalised; logit_scale already exponentiated; logit_bias a
        number, a tensor of one element, or None for 0.

        Returns the scalar loss, or ``{"contrastive_loss": loss}`` with ``output_dict``.
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
    """The forward of a ``ClipLoss``, this module's or open_clip's."""
    group = _world(module.rank, module.world_size)
    loss = contrastive_loss(image_features, text_features, logit_scale, normalize=False, group=group)
    assert isinstance(loss, Tensor)
    if isinstance(logit_bias, Tensor):
        loss = loss + 0.0 * logit_bias.sum()
    return {"contrastive_loss": loss} if output_dict else loss


def siglip_loss(
    module: Any,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None,
    output_dict: bool = False,
) -> Tensor | dict[str, Tensor]:
    """The forward of a ``SigLipLoss``, this module's or open_clip's."""
    bias = 0.0 if logit_bias is None else logit_bias
    group = _world(module.rank, module.world_size)
    comm = "ring" if module.dist_impl in ("bidir", "shift") else "gather"
    loss = sigmoid_loss(image_features, text_features, logit_scale, bias, normalize=False, group=group, comm=comm)
    return {"contrastive_loss": loss} if output_dict else loss


def _refuse_hooks(module: nn.Module, name: str, hooks: tuple[str, ...]) -> None:
    """TypeError where a method is there that open_clip's forward calls."""
    for hook in hooks:
        if hasattr(type(module), hook) or hook in vars(module):
            raise TypeError(
                f"fastclip.{name} never forms the logits, so that {type(module).__name__}.{hook} would not be called: "
                f"inherit from open_clip.loss.{name}, or override forward"
            )


_DIST_IMPLS = ("bidir", "shift", "reduce", "gather")


def _world(rank: int, world_size: int) -> Any:
    """The default process group, or None for one process."""
    if world_size == 1:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(f"world_size={world_size} needs torch.distributed: call init_process_group before the loss")
    if (dist.get_rank(), dist.get_world_size()) != (rank, world_size):
        raise ValueError(
            f"rank={rank}, world_size={world_size} are not those of torch.distributed's default group: "
            f"{dist.get_rank()}, {dist.get_world_size()}"
        )
    return dist.group.WORLD
