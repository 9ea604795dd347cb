"""Features on which losses are timed, the timed step, and the check of value and gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.bench.harness import Case, Step

__all__ = ["DENSE", "SCALARS", "CheckFailed", "Loss", "check_one", "features", "leaves_of", "step_of"]

Loss = Callable[..., Tensor]  # takes image, text, scale and, for the sigmoid loss, bias

SCALARS = {"softmax": (20.0,), "sigmoid": (10.0, -10.0)}  # scale, bias


class CheckFailed(AssertionError):
    """Raised if the value or the gradients of a provider differ from the reference values."""


def _dense_softmax(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    z = scale * image @ text.T
    pairs = torch.arange(len(z), device=z.device)
    return (F.cross_entropy(z, pairs) + F.cross_entropy(z.T, pairs)) / 2


def _dense_sigmoid(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    z = scale * image @ text.T + bias
    return (F.softplus(z).sum() - z.trace()) / len(z)


DENSE: dict[str, Loss] = {"softmax": _dense_softmax, "sigmoid": _dense_sigmoid}  # as the papers write them


def features(N: int, D: int, dtype: str, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return normalised features (N, D) that require gradients. The cosine of a pair is about 0.3."""
    generator = torch.Generator(device).manual_seed(N + seed)

    def directions() -> Tensor:
        return F.normalize(torch.randn(N, D, generator=generator, device=device), dim=1)

    image = directions()
    text = F.normalize(image + 3.0 * directions(), dim=1)
    image, text = (x.to(getattr(torch, dtype)).requires_grad_() for x in (image, text))
    return image, text


def leaves_of(case: Case, device: str = "cpu", seed: int = 0) -> tuple[Tensor, ...]:
    """Return image and text features, scale and, for the sigmoid loss, bias."""
    scalars = (torch.tensor(value, device=device, requires_grad=True) for value in SCALARS[case.loss])
    return *features(case.N, case.D, case.dtype, device, seed), *scalars


def step_of(case: Case, loss: Loss, leaves: tuple[Tensor, ...]) -> Step:
    """Return the step to be timed. For a backward step, the forward pass is run here and is not timed."""
    for x in leaves:
        x.grad = None
    if case.mode == "backward":
        value = loss(*leaves)
        return lambda: value.backward()
    if case.mode == "forward":
        return lambda: (loss(*leaves), None)[1]
    return lambda: loss(*leaves).backward()


def check_one(name: str, loss: Loss, leaves: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Raise CheckFailed unless value and gradients of `loss` equal `expected` within the precision of the dtype."""
    rtol = 1e-4 if leaves[0].dtype == torch.float32 else 2e-2
    value = loss(*leaves)
    gradients = torch.autograd.grad(value, leaves[: len(expected) - 1])
    errors = [_relative_error(x, y) for x, y in zip((value.detach(), *gradients), expected, strict=True)]
    limits = [rtol] + [5 * rtol] * len(gradients)
    if not all(error <= limit for error, limit in zip(errors, limits, strict=True)):  # NaN fails too
        what = ["loss", "d_image", "d_text", "d_scale", "d_bias"]
        parts = (f"{x} {error:.1e}" for x, error in zip(what, errors))
        raise CheckFailed(f"{name}: relative errors {', '.join(parts)}")


def _relative_error(x: Tensor, y: Tensor) -> float:
    return (torch.dist(x.float(), y.float()) / y.float().norm()).item()
