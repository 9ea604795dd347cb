"""Optimisers, the learning rate's schedule, gradient norms."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["build_optimizer", "clip_gradients", "gradient_norm", "parameter_groups", "warmup_cosine"]


def warmup_cosine(step: int, *, warmup_steps: int, steps: int) -> float:
    """Return the learning rate's factor at `step` (from 0): linear up to 1, then half a cosine towards 0 at `steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return groups for an optimiser: matrices and convolutions decay, vectors (biases, gains, the class token) and
    numbers (scale and bias of the logits) do not (Radford et al. 2021, section 2.5).

    Numbers have a group of their own: FSDP does not shard them, and an optimiser takes a group's tensors together.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    numbers: list[nn.Parameter] = []
    for p in model.parameters():
        if p.requires_grad:
            is_matrix = sum(size > 1 for size in p.shape) >= 2  # the class token, (1, 1, D), is none
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
    """Make adamw, fused, or lamb (You et al. 2020; ALIGN's), timm's without its clipping."""
    groups = parameter_groups(model, weight_decay)
    if name == "lamb":
        from timm.optim.lamb import Lamb

        return Lamb(groups, lr=lr, betas=betas, eps=eps, max_grad_norm=None)  # `clip_gradients` has clipped
    if name != "adamw":
        raise ValueError(f"no optimiser is called {name!r}: adamw, lamb")
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the norm () of all gradients together; of sharded parameters (FSDP2) that of the whole, on every rank."""
    from torch.distributed.tensor import DTensor  # slow to load

    # torch's own needs one kind of tensor, and FSDP leaves numbers unsharded
    norms = [nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in _kinds(parameters)]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.linalg.vector_norm(torch.stack(whole)) if whole else torch.zeros(())


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Scale all gradients, whose `norm` is known, down to `max_norm` where they are longer."""
    for kind in _kinds(parameters):
        nn.utils.clip_grads_with_norm_(kind, max_norm, norm)


def _kinds(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return those with gradients, plain and sharded ones apart: torch takes no mixture."""
    from torch.distributed.tensor import DTensor

    with_gradients = [p for p in parameters if p.grad is not None]
    kinds = [[p for p in with_gradients if isinstance(p.grad, DTensor) is sharded] for sharded in (False, True)]
    return [kind for kind in kinds if kind]
