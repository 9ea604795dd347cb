"""Patch that replaces open_clip's losses by fastclip's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastclip.integrations.patching import Calls, check_same_loss, check_version, original, replace
from fastclip.losses.contrastive import contrastive_loss
from fastclip.losses.distillation import contrastive_and_distillation
from fastclip.losses.modules import clip_loss, distill_clip_loss, siglip_loss
from fastclip.losses.sigmoid import sigmoid_loss

__all__ = ["patch_open_clip"]

_PACKAGE = "open_clip"
_KNOWN = (3, 3)


def patch_open_clip() -> None:
    """Make the losses of ``open_clip.loss`` compute fastclip's losses, wherever they were imported.

    The forward of ``ClipLoss``, ``SigLipLoss`` and ``DistillClipLoss`` is replaced, so ``open_clip.create_loss``,
    ``open_clip_train`` and existing instances need no change. Values and gradients remain those of open_clip up to
    rounding. For ``logit_scale``, this holds for the gradient after DDP's mean over processes.

    - With ``world_size > 1``, ``ClipLoss`` and ``DistillClipLoss`` are computed by fastclip if ``local_loss`` and
      ``gather_with_grad`` are both set (``--local-loss --gather-with-grad``). With other flags, the gradients of
      open_clip, or its value on each rank, differ from those of `fastclip.ClipLoss`. With such flags, or with Horovod,
      open_clip computes the loss, and a warning is logged once.
    - ``SigLipLoss`` is computed by fastclip for every ``dist_impl``, because all of them compute the same loss.
    - ``CoCaLoss`` takes its contrastive part from ``ClipLoss``, and thus from fastclip.
    - ``DistillClipLoss`` is computed by open_clip if the teacher's features require gradients, which fastclip's does
      not compute, and a warning is logged once.
    - If ``get_logits``, ``get_ground_truth``, ``dist_loss`` or ``_loss`` is overridden (by a subclass, an attribute of
      the instance or a later patch), or ``open_clip.loss.gather_features`` is replaced, open_clip computes the loss,
      and a warning is logged once.

    `fastclip.integrations.unpatch` undoes the patch. A second call changes nothing.

    Raises:
        ImportError: open_clip is not installed.
        RuntimeError: the version of open_clip is not 3.3, or its losses were changed. Nothing is replaced.
    """
    import open_clip.loss as theirs
    from open_clip import __version__ as version

    check_version(
        _PACKAGE, version, _KNOWN, _KNOWN, "import ClipLoss and SigLipLoss from fastclip in your training code"
    )
    classes = theirs.ClipLoss, theirs.SigLipLoss, theirs.DistillClipLoss
    clip, sigmoid, distill = (original(_PACKAGE, owner) for owner in classes)
    _check(theirs, clip, sigmoid, distill)
    replace(
        _PACKAGE,
        {
            theirs.ClipLoss: _clip_forward(clip, clip_loss, Calls(theirs.ClipLoss, clip)),
            theirs.SigLipLoss: _sigmoid_forward(sigmoid, Calls(theirs.SigLipLoss, sigmoid)),
            theirs.DistillClipLoss: _clip_forward(distill, distill_clip_loss, Calls(theirs.DistillClipLoss, distill)),
        },
    )


def _sigmoid_forward(dense: Callable[..., Any], calls: Calls) -> Callable[..., Any]:
    @functools.wraps(dense)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (dense if calls.replaced(self) else siglip_loss)(self, *args, **kwargs)

    return forward


def _clip_forward(dense: Callable[..., Any], ours: Callable[..., Any], calls: Calls) -> Callable[..., Any]:
    """Return the forward of ClipLoss or DistillClipLoss, whose original is `dense`."""

    @functools.wraps(dense)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if calls.replaced(self):
            return dense(self, *args, **kwargs)
        if ours is distill_clip_loss and _teacher_learns(args, kwargs):
            calls.warn_once(
                "open_clip's DistillClipLoss is used: the teacher's features or its scale require gradients"
            )
            return dense(self, *args, **kwargs)
        if self.world_size == 1 or (self.local_loss and self.gather_with_grad and not self.use_horovod):
            return ours(self, *args, **kwargs)
        calls.warn_once(
            f"open_clip's {calls.owner.__name__} is used: with world_size={self.world_size}, fastclip computes the "
            "loss only for local_loss=True and gather_with_grad=True (--local-loss --gather-with-grad), without Horovod"
        )
        return dense(self, *args, **kwargs)

    return forward


def _teacher_learns(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return True if an argument of DistillClipLoss.forward that belongs to the teacher requires a gradient."""
    of_teacher = [*args[3:6], *(x for name, x in kwargs.items() if name.startswith("dist_"))]
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in of_teacher)


def _check(theirs: Any, clip: Callable[..., Any], sigmoid: Callable[..., Any], distill: Callable[..., Any]) -> None:
    """Raise RuntimeError unless open_clip's losses equal fastclip's on a few random numbers."""
    numbers = torch.Generator(device="cpu").manual_seed(0)
    image, text = torch.randn(2, 5, 4, dtype=torch.float64, device="cpu", generator=numbers)
    scale, bias = torch.tensor([[7.0], [-3.0]], dtype=torch.float64, device="cpu")
    leaves = [x.requires_grad_() for x in (image, text, scale, bias)]
    options: dict[str, Any] = {"normalize": False, "backend": "reference"}
    check_same_loss(
        "open_clip.loss.ClipLoss.forward",
        lambda: clip(theirs.ClipLoss(), image, text, scale),
        lambda: contrastive_loss(image, text, scale, **options),
        leaves[:3],
    )
    check_same_loss(
        "open_clip.loss.SigLipLoss.forward",
        lambda: sigmoid(theirs.SigLipLoss(), image, text, scale, bias),
        lambda: sigmoid_loss(image, text, scale, bias, **options),
        leaves,
    )
    teacher = image.detach().flip(0), text.detach(), scale.detach() / 2
    check_same_loss(
        "open_clip.loss.DistillClipLoss.forward",
        lambda: _weighted(distill(theirs.DistillClipLoss(), image, text, scale, *teacher)),
        lambda: _weighted(contrastive_and_distillation((image, text, scale), teacher, **options)),
        leaves[:3],
    )


def _weighted(losses: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return a sum of both losses in which neither can stand in for the other."""
    contrastive, distillation = losses
    return contrastive + 3.0 * distillation
