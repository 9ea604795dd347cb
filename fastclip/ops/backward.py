"""Shared parts of the ops: tags, saved tensors, and second derivatives by autograd on the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastclip._backends import pick

__all__ = ["TAGS", "apart", "check_second_derivatives", "keep", "kept", "vector_jacobian"]

# needs_exact_strides: compiled code passes tensors to the op in the same layout as eager code
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def keep(ctx: Any, inputs: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    """Save an op's arguments, and further tensors, for its backward pass."""
    # torch saves the tensors: it detects in-place changes, runs users' hooks, and frees them with the graph
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs), *tensors)
    ctx.options = [None if isinstance(x, Tensor) else x for x in inputs]


def kept(ctx: Any) -> tuple[list[Any], tuple[Tensor, ...]]:
    """Return the arguments and tensors that `keep` saved.

    Call it once per backward pass: activation checkpointing lets recomputed tensors be read only once.
    """
    saved = ctx.saved_tensors
    inputs = [option if x is None else x for x, option in zip(saved, ctx.options)]
    return inputs, saved[len(inputs) :]


def apart(d: Tensor) -> Tensor:
    """Return a gradient that shares no memory with others, as an op requires. A backend may store scalars together."""
    return d.contiguous() if d.dim() else d.clone()


def check_second_derivatives(function: str, backend: str | None, image: Tensor) -> None:
    """Raise RuntimeError unless the backend chosen for `image` is the reference."""
    name, _ = pick(backend, image)
    if name != "reference":
        raise RuntimeError(
            f"backend={name!r} has no second derivatives (the loss was differentiated with create_graph=True); "
            f"pass backend='reference' to {function}"
        )


def vector_jacobian(
    outputs: Sequence[Tensor | None], grads: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return sum_k grads_k d outputs_k / d input for every input, differentiable.

    The result is None for an input that does not require a gradient.
    """
    used = [(o, d) for o, d in zip(outputs, grads) if o is not None and d is not None]
    wanted = [x for x in inputs if x.requires_grad]
    gradients = iter(
        torch.autograd.grad([o for o, _ in used], wanted, [d for _, d in used], allow_unused=True, create_graph=True)
    )
    return [next(gradients) if x.requires_grad else None for x in inputs]
