"""The losses with which fastclip is compared, each from its own package, called as image, text, scale (and bias) ->
loss.

All of them take normalised features and have the meaning of `open_clip.loss` for the same name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.bench.losses import SCALARS, Loss
from fastclip.system.installed import installed_version

COMPILER = "inductor"  # of torch.compile; a dry run uses one that compiles nothing


class Unavailable(Exception):
    """A provider cannot run here; the message contains the reason."""


@dataclass(frozen=True)
class Peer:
    """A package with losses to compare: `build[loss]()` imports it and returns the loss."""

    package: str
    build: dict[str, Callable[[], Loss]]
    gpu_only: bool = False
    dense: bool = False  # stores the N x N logits of both directions and their gradients at once
    compiled: bool = False  # compiled again for every shape
    # Gradients are computed in the forward pass, so the halves cannot be separated: `forward` would time nearly
    # everything, and `backward` a multiplication by the upstream gradient
    whole_step_only: bool = False


def _open_clip(name: str) -> Loss:
    import open_clip.loss

    return getattr(open_clip.loss, name)()


def _open_clip_compiled(name: str) -> Loss:
    if not (torch.cuda.is_available() or shutil.which(os.environ.get("CXX", "g++"))):
        raise Unavailable("no C++ compiler for torch.compile")
    # With fullgraph, code that cannot be compiled is an error instead of a loss that runs uncompiled
    return torch.compile(_open_clip(name), fullgraph=True, dynamic=False, backend=COMPILER)


def _both_directions(cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    """Build the loss from a fused linear cross-entropy (input, weight, labels), which is one direction:
    the other modality is its weight.
    """

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        labels = torch.arange(image.shape[0], device=image.device)
        return (cross_entropy(scale * image, text, labels) + cross_entropy(scale * text, image, labels)) / 2

    return loss


def _linear_cross_entropy() -> Loss:
    if not hasattr(F, "linear_cross_entropy"):  # newer than the oldest torch that fastclip supports
        raise Unavailable(f"not in torch {torch.__version__}")
    options = torch.nn.LinearCrossEntropyOptions()  # torch's default chunks and precision
    return _both_directions(lambda x, weight, labels: F.linear_cross_entropy(x, weight, labels, options=options))


def _cut_cross_entropy() -> Loss:
    from cut_cross_entropy import LinearCrossEntropyImpl, linear_cross_entropy

    # Exact, without its filter, which drops small gradients. Newer versions call this cce_exact, and sum in fp32 there
    exact = hasattr(LinearCrossEntropyImpl, "CCE_EXACT")
    options = {"impl": "cce_exact"} if exact else {"impl": "cce", "filter_eps": None}
    return _both_directions(lambda x, weight, labels: linear_cross_entropy(x, weight, labels, **options))


def _inf_cl() -> Loss:
    # The computation of inf_cl's cal_inf_loss on each GPU without the ring around it; it returns one loss per row
    from inf_cl import cal_flash_loss

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        by_image = cal_flash_loss(image, text, scale=scale).mean()
        by_text = cal_flash_loss(text, image, scale=scale).mean()
        return (by_image + by_text) / 2

    return loss


def _memeff() -> Loss:
    from memeff import MemoryEfficientCLIPLoss

    # Its scale is a constant of the module without a gradient, and stable=True would return other gradients
    (scale,) = SCALARS["softmax"]
    module = MemoryEfficientCLIPLoss(temperature=1 / scale, normalized_inputs=True, stable=False)
    return lambda image, text, scale: module(image, text)


def _siglip_kernel() -> Loss:
    from siglip_kernel import fused_siglip_loss

    return lambda image, text, scale, bias: fused_siglip_loss(image, text, scale.log(), bias)


def _both_losses(function: Callable[[str], Loss]) -> dict[str, Callable[[], Loss]]:
    return {"softmax": lambda: function("ClipLoss"), "sigmoid": lambda: function("SigLipLoss")}


PEERS = {
    "open_clip": Peer("open_clip_torch", _both_losses(_open_clip), dense=True),
    "open_clip_compiled": Peer("open_clip_torch", _both_losses(_open_clip_compiled), dense=True, compiled=True),
    "linear_cross_entropy": Peer("torch", {"softmax": _linear_cross_entropy}, whole_step_only=True),
    "cut_cross_entropy": Peer("cut-cross-entropy", {"softmax": _cut_cross_entropy}, gpu_only=True),
    "inf_cl": Peer("inf-cl", {"softmax": _inf_cl}, gpu_only=True),
    "memeff": Peer("memeff", {"softmax": _memeff}, gpu_only=True),
    "siglip_kernel": Peer("siglip-kernel", {"sigmoid": _siglip_kernel}, gpu_only=True, whole_step_only=True),
}
CONSTANT_SCALE = frozenset({"memeff"})  # no gradient of the scale


def build(name: str, loss: str) -> Loss:
    """Return the peer's loss. Raises Unavailable if its package is missing or does not load;
    the message is a row's status.
    """
    peer = PEERS[name]
    try:
        return peer.build[loss]()
    except Exception as error:  # importing another package may raise anything
        if isinstance(error, Unavailable):
            raise
        if isinstance(error, ImportError) and not installed_version(peer.package):
            raise Unavailable("not installed") from error
        raise Unavailable(f"error: {describe(error)}") from error


def describe(error: BaseException) -> str:
    """Return the type and the first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]
