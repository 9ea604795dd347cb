"""``fastclip::contrastive_fwd`` and ``fastclip::contrastive_bwd`` as torch ops: schema, fake, autograd, autocast.

The forward returns statistics of z_ij = scale r_i c_j <image_i, text_j>; the loss is made of them in torch
(`fastclip/loss.py`), so torch's autograd supplies the derivatives by each statistic and the backward op turns them
into gradients of the features and the scale. `_backends/reference.py` states both functions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip._backends import pick, reference

__all__ = ["Statistics", "autocast_dtype", "autocast_features", "contrastive_statistics"]

_PROBLEM = (
    "Tensor image, Tensor text, Tensor scale, Tensor? image_labels, Tensor? text_labels, int offset, "
    "bool normalize, str? backend"
)

torch.library.define(
    "fastclip::contrastive_fwd",
    f"({_PROBLEM}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
torch.library.define(
    "fastclip::contrastive_bwd",
    f"({_PROBLEM}, Tensor[] stats, Tensor[] grads, bool[] needs) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


class Statistics(NamedTuple):
    """What `fastclip::contrastive_fwd` returns; shapes in `reference.contrastive_fwd`."""

    row_neg: Tensor
    col_neg: Tensor
    row_pos: Tensor
    col_pos: Tensor
    row_pos_lse: Tensor
    col_pos_lse: Tensor
    image_inv_norm: Tensor
    text_inv_norm: Tensor


_Labels = tuple[Tensor, Tensor] | None


def _pair(image_labels: Tensor | None, text_labels: Tensor | None) -> _Labels:
    return None if image_labels is None or text_labels is None else (image_labels, text_labels)


@torch.library.impl("fastclip::contrastive_fwd", "default")
def _fwd(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    image_labels: Tensor | None,
    text_labels: Tensor | None,
    offset: int,
    normalize: bool,
    backend: str | None,
) -> tuple[Tensor, ...]:
    _, module = pick(backend, image)
    out: tuple[Tensor, ...] = module.contrastive_fwd(
        image, text, scale, _pair(image_labels, text_labels), offset, normalize
    )
    return out


@torch.library.register_fake("fastclip::contrastive_fwd")
def _fwd_fake(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    image_labels: Tensor | None,
    text_labels: Tensor | None,
    offset: int,
    normalize: bool,
    backend: str | None,
) -> tuple[Tensor, ...]:
    M, N = image.shape[0], text.shape[0]
    M_pos, N_pos = (0, 0) if image_labels is None else (M, N)
    wide = reference.wide_dtype(image.device)
    stats = (image.new_empty(size, dtype=wide) for size in (M, N, M, N, M_pos, N_pos))
    return *stats, *(image.new_empty(size, dtype=torch.promote_types(image.dtype, torch.float32)) for size in (M, N))


@torch.library.impl("fastclip::contrastive_bwd", "default")
def _bwd(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    image_labels: Tensor | None,
    text_labels: Tensor | None,
    offset: int,
    normalize: bool,
    backend: str | None,
    stats: list[Tensor],
    grads: list[Tensor],
    needs: list[bool],
) -> tuple[Tensor, ...]:
    _, module = pick(backend, image)
    out = module.contrastive_bwd(
        image, text, scale, _pair(image_labels, text_labels), offset, normalize, stats, grads, needs
    )
    return tuple(image.new_empty(0) if d is None else d.contiguous() for d in out)


@torch.library.register_fake("fastclip::contrastive_bwd")
def _bwd_fake(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    image_labels: Tensor | None,
    text_labels: Tensor | None,
    offset: int,
    normalize: bool,
    backend: str | None,
    stats: list[Tensor],
    grads: list[Tensor],
    needs: list[bool],
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) if need else image.new_empty(0) for x, need in zip((image, text, scale), needs))


def _save_fwd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.options = inputs[5:]


def _fwd_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    problem, stats = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
    needs = list(ctx.needs_input_grad[:3])
    upstream = [torch.zeros_like(x) if d is None else d for x, d in zip(stats[:6], grads)]
    out = torch.ops.fastclip.contrastive_bwd(*problem, *ctx.options, list(stats), upstream, needs)
    return *(d if need else None for d, need in zip(out, needs)), None, None, None, None, None


torch.library.register_autograd("fastclip::contrastive_fwd", _fwd_backward, setup_context=_save_fwd)


def _save_bwd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *problem, offset, normalize, backend, stats, grads, needs = inputs
    ctx.save_for_backward(*problem, *grads)
    ctx.options, ctx.backend, ctx.stats, ctx.needs = (offset, normalize), backend, len(stats), needs


def _bwd_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Second derivatives, on the reference: both functions again in torch, so that autograd sees through them."""
    name, _ = pick(ctx.backend, ctx.saved_tensors[0])
    if name != "reference":
        raise RuntimeError(
            f"backend={name!r} has no second derivatives (create_graph=True was used through the loss); "
            "pass backend='reference' to contrastive_loss"
        )
    with torch.enable_grad():
        image, text, scale, image_labels, text_labels, *upstream = ctx.saved_tensors
        # Views, so that the derivatives below stop here: the upstream gradients depend on the features themselves
        inputs = [x.view_as(x) for x in (image, text, scale, *upstream)]
        image, text, scale, *upstream = inputs
        offset, normalize = ctx.options
        labels = _pair(image_labels, text_labels)
        stats = list(reference.contrastive_fwd(image, text, scale, labels, offset, normalize))
        out = reference.contrastive_bwd(
            image, text, scale, labels, offset, normalize, stats, upstream, [True, True, True]
        )
        used = [(o, d) for o, d, need in zip(out, grads, ctx.needs) if need and o is not None and d is not None]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in used],
                [x for x in inputs if x.requires_grad],
                [d for _, d in used],
                allow_unused=True,
                create_graph=True,
            )
        )
        second = [next(found) if x.requires_grad else None for x in inputs]
    # `stats` get nothing: they were recomputed from the features above, so their part is in the features' gradient
    return *second[:3], None, None, None, None, None, [None] * ctx.stats, second[3:], None


torch.library.register_autograd("fastclip::contrastive_bwd", _bwd_backward, setup_context=_save_bwd)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that torch.autocast, where it is on, wants `x` in; fp64 is left alone as torch's own ops do."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def autocast_features(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both features in autocast's dtype; the scale stays in fp32 (fp64 beside fp64 features)."""
    image, text = image.to(autocast_dtype(image)), text.to(autocast_dtype(text))
    return image, text, scale.to(torch.promote_types(image.dtype, torch.float32))


def contrastive_statistics(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    labels: _Labels = None,
    *,
    offset: int = 0,
    normalize: bool = True,
    backend: str | None = None,
) -> Statistics:
    """Differentiable statistics of the logits of image (M, D) and text (N, D); see `reference.contrastive_fwd`.

    The inverse norms it returns carry no gradient.
    """
    image_labels, text_labels = labels or (None, None)
    row_neg, col_neg, row_pos, col_pos, row_pos_lse, col_pos_lse, r, c = torch.ops.fastclip.contrastive_fwd(
        image, text, scale, image_labels, text_labels, offset, normalize, backend
    )
    return Statistics(row_neg, col_neg, row_pos, col_pos, row_pos_lse, col_pos_lse, r.detach(), c.detach())
