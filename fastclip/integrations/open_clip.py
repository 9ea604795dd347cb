"""The losses of open_clip, computed by fastclip's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from fastclip.integrations.patching import Calls, check_same_loss, check_version, original, replace
from fastclip.losses.contrastive import contrastive_loss
from fastclip.losses.modules import clip_loss, siglip_loss
from fastclip.losses.sigmoid import sigmoid_loss

__all__ = ["patch_open_clip"]

_PACKAGE = "open_clip"
_KNOWN = (3, 3)


def patch_open_clip() -> None:
    """Let ``open_clip.loss.ClipLoss`` and ``SigLipLoss`` compute fastclip's losses, wherever they were imported to.

    The forward of both classes is replaced, so that ``open_clip.create_loss``, ``open_clip_train`` and instances that
    are there already need no change. Values and gradients stay open_clip's, up to rounding
    (``logit_scale``'s after the mean over processes that DDP takes):

    - with ``world_size > 1`` a ``ClipLoss`` is replaced where ``local_loss`` and ``gather_with_grad`` are both set
      (``--local-loss --gather-with-grad``). Other flags make other gradients, or another value on each rank, than
      `fastclip.ClipLoss`: they are left to open_clip, as Horovod is, and a warning says so once.
    - ``SigLipLoss`` is replaced whatever ``dist_impl`` is; they are ways to the same loss.
    - ``CoCaLoss`` takes its contrastive part from ``ClipLoss``, hence from fastclip. ``DistillClipLoss`` needs the
      logits themselves and stays as it is.
    - A loss with another ``get_logits``, ``get_ground_truth`` or ``_loss`` (a subclass's, an attribute of the instance,
      a later patch), or with another ``open_clip.loss.gather_features``, is left to open_clip: a warning says so once.

    `fastclip.integrations.unpatch` undoes it. A second call changes nothing.

    Raises:
        ImportError: open_clip is not installed.
        RuntimeError: a version of open_clip that is not known, or losses that are not its own; nothing is replaced.
    """
    import open_clip.loss as theirs
    from open_clip import __version__ as version

    check_version(_PACKAGE, version, _KNOWN, _KNOWN, "import ClipLoss and SigLipLoss from fastclip where you train")
    clip, sigmoid = original(_PACKAGE, theirs.ClipLoss), original(_PACKAGE, theirs.SigLipLoss)
    _check(theirs, clip, sigmoid)
    replace(
        _PACKAGE,
        {
            theirs.ClipLoss: _clip_forward(clip, Calls(theirs.ClipLoss, clip)),
            theirs.SigLipLoss: _sigmoid_forward(sigmoid, Calls(theirs.SigLipLoss, sigmoid)),
        },
    )


def _sigmoid_forward(dense: Callable[..., Any], calls: Calls) -> Callable[..., Any]:
    @functools.wraps(dense)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (dense if calls.replaced(self) else siglip_loss)(self, *args, **kwargs)

    return forward


def _clip_forward(dense: Callable[..., Any], calls: Calls) -> Callable[..., Any]:
    @functools.wraps(dense)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if calls.replaced(self):
            return dense(self, *args, **kwargs)
        if self.world_size == 1 or (self.local_loss and self.gather_with_grad and not self.use_horovod):
            return clip_loss(self, *args, **kwargs)
        calls.warn_once(
            f"open_clip's own ClipLoss is used: with world_size={self.world_size} only local_loss=True and "
            "gather_with_grad=True (--local-loss --gather-with-grad), without Horovod, is the loss that fastclip "
            "computes"
        )
        return dense(self, *args, **kwargs)

    return forward


def _check(theirs: Any, clip: Callable[..., Any], sigmoid: Callable[..., Any]) -> None:
    """Compare both formulas on a few numbers."""
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
