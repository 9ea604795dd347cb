"""Second derivatives: on the reference only, by autograd through its formulas."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastclip._backends import pick

__all__ = ["check_second_derivatives", "vector_jacobian"]


def check_second_derivatives(function: str, backend: str | None, image: Tensor) -> None:
    """RuntimeError unless the backend that served `image` is the reference."""
    name, _ = pick(backend, image)
    if name != "reference":
        raise RuntimeError(
            f"backend={name!r} has no second derivatives (create_graph=True was used through the loss); "
            f"pass backend='reference' to {function}"
        )


def vector_jacobian(
    outputs: Sequence[Tensor | None], grads: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """sum_k grads_k d outputs_k / d input, itself differentiable, for every input; None where it wants none."""
    used = [(o, d) for o, d in zip(outputs, grads) if o is not None and d is not None]
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(
        torch.autograd.grad([o for o, _ in used], wanted, [d for _, d in used], allow_unused=True, create_graph=True)
    )
    return [next(found) if x.requires_grad else None for x in inputs]
