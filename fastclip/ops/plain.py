"""``fastclip::plain_fwd`` and ``fastclip::plain_bwd``: the mean loss without labels, as one op per direction.

With few rows the host, not the products, limits a training step. Here the backend computes the loss, and what its
gradients need, in a few calls, and in eager mode an autograd.Function calls it without torch's dispatcher. All other
forms of the loss are computed in torch from the statistics (`losses/contrastive.py`), with the same values.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastclip._backends import pick, reference, serving_pairs
from fastclip.ops.autocast import no_autocast, without_autocast
from fastclip.ops.backward import TAGS, check_second_derivatives, keep, kept
from fastclip.ops.transforms import direct, recorded, transformed

__all__ = ["plain_loss"]

_PROBLEM = "Tensor image, Tensor text, Tensor scale"
_OPTIONS = "float image_weight, bool normalize, str? backend"
torch.library.define("fastclip::plain_fwd", f"({_PROBLEM}, {_OPTIONS}) -> (Tensor, Tensor)", tags=TAGS)
torch.library.define(
    "fastclip::plain_bwd",
    f"({_PROBLEM}, Tensor saved, {_OPTIONS}, Tensor d_loss, bool[] needs) -> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)


def plain_loss(problem: tuple[Tensor, ...], image_weight: float, normalize: bool, backend: str | None) -> Tensor | None:
    """Return the differentiable loss (), fp32, of a problem: image (N, D), text (N, D) and scale (), fp32.

    None is returned if the general form of the loss is the better choice. This is the case for the reference in eager
    mode, because the general form has second derivatives, and under torch.compile if the directions have unequal
    weights.
    """
    compiling = torch.compiler.is_compiling()
    if compiling and image_weight != 0.5:  # every new weight would compile the graph again
        return None
    if not compiling:
        name, module = pick(backend, problem[0])
        if name == "reference":
            return None
    if compiling or recorded():
        loss: Tensor = torch.ops.fastclip.plain_fwd(*problem, image_weight, normalize, backend)[0]
        return loss
    eager: Tensor = _Plain.apply(*problem, image_weight, normalize, backend, module)
    return eager


class _Plain(torch.autograd.Function):
    """The autograd formula of the ops below, without torch's dispatcher."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        image_weight: float,
        normalize: bool,
        backend: str | None,
        module: ModuleType,
    ) -> Tensor:
        loss, saved = module.plain_fwd(image, text, scale, image_weight, normalize)
        ctx.save_for_backward(image, text, scale, saved)
        ctx.options, ctx.module = (image_weight, normalize, backend), module
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        image, text, scale, saved = ctx.saved_tensors  # activation checkpointing lets them be read once
        image_weight, normalize, _ = ctx.options
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph=True: the graph must contain the op
            out = _gradients((image, text, scale, *ctx.options), saved, d_loss, needs)
        elif not direct(d_loss):
            out = _dense_gradients((image, text, scale, *ctx.options), d_loss, needs)
        else:
            saved = saved.contiguous()  # a hook of the user may have changed its layout
            out = ctx.module.plain_bwd(image, text, scale, saved, image_weight, normalize, d_loss, needs)
        return *out, None, None, None, None


def _dense_gradients(args: Any, d_loss: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Return the gradients of image, text and scale, computed by torch operations, so that torch sees d_loss."""
    image, text, scale, image_weight, normalize, _ = args
    with no_autocast(d_loss.device):
        _, saved = reference.plain_fwd(image, text, scale, image_weight, normalize)
        return reference.plain_bwd(image, text, scale, saved, image_weight, normalize, d_loss, needs)


def _gradients(args: Any, saved: Tensor, d_loss: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Return the gradients of image, text and scale by ``fastclip::plain_bwd``. args: the arguments of the forward."""
    if transformed(d_loss):  # batched, or with a tangent that the op would drop
        return _dense_gradients(args, d_loss, needs)
    out = torch.ops.fastclip.plain_bwd(*args[:3], saved, *args[3:], d_loss, list(needs))
    return tuple(d if need else None for d, need in zip(out, needs))


@torch.library.impl("fastclip::plain_fwd", "default")
@without_autocast
def _fwd(
    image: Tensor, text: Tensor, scale: Tensor, image_weight: float, normalize: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    if text.shape != image.shape:
        raise ValueError(f"fastclip::plain_fwd needs pairs (N, D), got {tuple(image.shape)} and {tuple(text.shape)}")
    out: tuple[Tensor, Tensor] = serving_pairs(backend, image).plain_fwd(image, text, scale, image_weight, normalize)
    return out


@torch.library.register_fake("fastclip::plain_fwd")
def _fwd_fake(image: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *_, backend = args
    saved = pick(backend, image)[1].plain_saved(image.shape[0])
    return image.new_empty((), dtype=torch.float32), image.new_empty(saved, dtype=torch.float32)


@torch.library.impl("fastclip::plain_bwd", "default")
@without_autocast
def _bwd(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    saved: Tensor,
    image_weight: float,
    normalize: bool,
    backend: str | None,
    d_loss: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    module = serving_pairs(backend, image)
    if text.shape != image.shape or saved.numel() != module.plain_saved(image.shape[0]):
        raise ValueError(
            f"fastclip::plain_bwd needs `saved` from fastclip::plain_fwd for the same features: got {saved.numel()} "
            f"numbers for image {tuple(image.shape)} and text {tuple(text.shape)}"
        )
    out = module.plain_bwd(image, text, scale, saved.contiguous(), image_weight, normalize, d_loss, needs)
    return tuple(image.new_empty(0) if d is None else d for d in out)


@torch.library.register_fake("fastclip::plain_bwd")
def _bwd_fake(image: Tensor, text: Tensor, scale: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *_, needs = args
    return tuple(x.new_empty(x.shape) if need else image.new_empty(0) for x, need in zip((image, text, scale), needs))


def _save_fwd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, saved = output
    ctx.set_materialize_grads(False)  # d_loss is None if only `saved` was used, which has no derivative
    ctx.mark_non_differentiable(saved)
    keep(ctx, inputs, [saved])


def _fwd_backward(ctx: Any, d_loss: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    args, (saved,) = kept(ctx)
    no_gradients = [None] * len(args)
    if d_loss is None:
        return tuple(no_gradients)
    return *_gradients(args, saved, d_loss, ctx.needs_input_grad[:3]), *no_gradients[3:]


torch.library.register_autograd("fastclip::plain_fwd", _fwd_backward, setup_context=_save_fwd)


def _save_bwd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, *_, ctx.backend, _, _ = inputs
    ctx.save_for_backward(image)


def _bwd_backward(ctx: Any, *_: Tensor | None) -> Any:
    (image,) = ctx.saved_tensors
    check_second_derivatives("contrastive_loss", ctx.backend, image)
    raise RuntimeError("a compiled loss has no second derivatives: call contrastive_loss outside torch.compile")


torch.library.register_autograd("fastclip::plain_bwd", _bwd_backward, setup_context=_save_bwd)
