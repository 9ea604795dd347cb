"""Optimisers, the schedule of the learning rate, and gradient norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = [
    "build_optimizer",
    "clip_gradients",
    "gradient_norm",
    "parameter_groups",
    "plain_and_sharded",
    "warmup_cosine",
]

T = TypeVar("T")


def warmup_cosine(step: int, *, warmup_steps: int, steps: int) -> float:
    """Return the factor of the learning rate at `step`, counted from 0.

    The factor rises linearly to 1 during the warm-up and then follows half a cosine towards 0 at `steps`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the parameter groups of an optimiser (Radford et al. 2021, section 2.5).

    Matrices and convolutions have weight decay. Vectors (biases, gains, the class token) and numbers (scale and bias of
    the logits) have none. Numbers form a separate group, because FSDP does not shard them and an optimiser may
    process all tensors of a group together.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    numbers: list[nn.Parameter] = []
    for p in model.parameters():
        if p.requires_grad:
            is_matrix = sum(size > 1 for size in p.shape) >= 2  # the class token (1, 1, D) is a vector
            (matrices if is_matrix else vectors if p.dim() else numbers).append(p)
    groups = ((matrices, weight_decay), (vectors, 0.0), (numbers, 0.0))
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def build_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-6,
) -> torch.optim.Optimizer:
    """Build an optimiser.

    Args:
        name: "adamw", torch's fused AdamW, or "lamb" (You et al. 2020), timm's LAMB without its gradient clipping.
            On a GPU both process the tensors of a group together: LAMB with timm 1.0.31 or newer, which splits them
            into parts if the GPU's L2 cache is large.
        model: model whose trainable parameters are optimised, grouped by `parameter_groups`.

    Raises:
        ValueError: the name is unknown.
    """
    groups = parameter_groups(model, weight_decay)
    if name == "lamb":
        from timm.optim.lamb import Lamb

        # By default, timm processes FSDP's tensors one by one, also on a GPU. On a CPU, tensors that are processed
        # together only take more memory. An older timm ignores this entry of a group
        together = next(model.parameters()).device.type == "cuda"
        groups = [{**group, "foreach": together} for group in groups]
        return Lamb(groups, lr=lr, betas=betas, eps=eps, max_grad_norm=None)  # `clip_gradients` does the clipping
    if name != "adamw":
        raise ValueError(f"unknown optimiser {name!r}: choose adamw or lamb")
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the norm () of all gradients together. Every rank gets the norm of the unsharded gradients under FSDP2."""
    from torch.distributed.tensor import DTensor  # slow to load

    norms = [nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in _kinds(parameters)]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.linalg.vector_norm(torch.stack(whole)) if whole else torch.zeros(())


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Scale all gradients down so that their total norm is at most `max_norm`. Their current `norm` is given."""
    for kind in _kinds(parameters):
        nn.utils.clip_grads_with_norm_(kind, max_norm, norm)


def _kinds(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return the parameters that have gradients, split by `plain_and_sharded`."""
    return plain_and_sharded((p for p in parameters if p.grad is not None), lambda p: p.grad)


def plain_and_sharded(values: Iterable[T], tensor: Callable[[T], Tensor | None]) -> list[list[T]]:
    """Split values into those with a plain tensor and those with one that FSDP2 has sharded, if there are any.

    torch cannot process both kinds together. FSDP2 leaves scalar parameters whole.

    Args:
        values: any values.
        tensor: function that returns the tensor of a value.
    """
    from torch.distributed.tensor import DTensor

    kinds: tuple[list[T], list[T]] = ([], [])
    for value in values:
        kinds[isinstance(tensor(value), DTensor)].append(value)
    return [kind for kind in kinds if kind]
