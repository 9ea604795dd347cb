"""The comparison of a loss with the truth and with dense torch, and its inputs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.parity.promised import FP32_GRADIENT, FP32_SUM, LOSS, SCALE_GRADIENT
from fastclip.parity.truth import Truth, loss_of, sigmoid_loss_of, truth

DENSE_FACTOR = 2.0  # largest allowed multiple of the error of the dense formula in the same dtype
PEAK_MIB = 100  # beyond inputs and their gradients, for N up to 16,384
COLLAPSED = 4.0  # multiplies FP32_SUM if all features are equal: equal terms round in the same direction


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def dense_direction(z: Tensor, positive: Tensor, smoothing: float, left_out: Tensor) -> Tensor:
    """Compute `fastclip.parity.truth.direction` with torch's cross-entropy, as users write it: the baseline."""
    has_positive = positive.any(1)
    z, positive, left_out = z[has_positive], positive[has_positive], left_out[has_positive]
    target = (1 - smoothing) * positive.to(z.dtype) / positive.sum(1, keepdim=True)
    target = target + smoothing * (~left_out).to(z.dtype) / (~left_out).sum(1, keepdim=True)
    return F.cross_entropy(z.masked_fill(left_out, torch.finfo(z.dtype).min / 4), target, reduction="none")


def dense(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    normalize: bool = True,
    scale_last: bool = False,
    **options: Any,
) -> Tensor:
    """Compute the loss in dense torch and the features' dtype. The scale multiplies the images,
    or the cosines (`scale_last`).
    """
    u, v = (F.normalize(x, dim=1) if normalize else x for x in (image, text))
    scale = scale.to(u.dtype)
    z = scale * (u @ v.T) if scale_last else scale * u @ v.T
    return loss_of(z, dense_direction, **options) if bias is None else sigmoid_loss_of(z + bias.to(u.dtype))


def dense_gradients(given: tuple[Tensor, ...], **options: Any) -> list[tuple[Tensor, ...]]:
    """Return gradients of dense torch for each of the orders in which users, and processors, multiply and add.

    With large logits the error differs by a factor of two between the orders; the largest one is the allowance.
    """
    found = []
    for reverse, scale_last in itertools.product((False, True), repeat=2):
        features = (x.flip(1) if reverse else x for x in given[:2])
        loss = dense(*features, *given[2:], scale_last=scale_last, **options)
        found.append(torch.autograd.grad(loss, given))
    return found


def leaves(image: Tensor, text: Tensor, *scalars: float) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(image.dtype, torch.float32)
    copies = tuple(x.detach().clone().requires_grad_() for x in (image, text))
    return *copies, *(torch.tensor(x, dtype=dtype, requires_grad=True) for x in scalars)


def check(
    loss: Any,
    image: Tensor,
    text: Tensor,
    scale: float,
    *,
    bias: float | None = None,
    base_line: bool = True,
    slack: float = 1.0,
    logit_error: float = 0.0,
    **options: Any,
) -> Truth:
    """Compare `loss(image, text, scale)` and its gradients with the truth (gate B) and with dense torch (gate A).

    With a bias, the loss is the sigmoid loss `loss(image, text, scale, bias)`. Gate A applies to tensors only,
    because scalars vary too much between seeds. `base_line=False` omits it, for inputs where dense torch has lost
    all digits. `slack` multiplies FP32_SUM. `logit_error` is the error of a positive's logit, and so the relative
    error of a solved batch's loss.
    """
    expected = truth(image, text, scale, bias=bias, **options)
    scalars = (scale,) if bias is None else (scale, bias)
    names = ("d_image", "d_text", "d_scale", "d_bias")[: 2 + len(scalars)]
    given = leaves(image, text, *scalars)
    value = loss(*given)
    found = dict(zip(names, torch.autograd.grad(value, given)))
    value = value.detach()
    size = max(abs(scale), 1.0) if options.get("label_smoothing") else 0.0  # smoothing adds a difference of means
    error = abs(float(value) - float(expected.loss))
    smallest = torch.finfo(value.dtype).tiny
    assert error <= (LOSS + logit_error) * float(expected.loss) + FP32_SUM * size + smallest, (
        f"loss {float(value)}, truth {float(expected.loss)}"
    )

    for name in names[2:]:
        true, true_sum = getattr(expected, name), getattr(expected, name + "_sum")
        budget = SCALE_GRADIENT * abs(float(true)) + max(slack * FP32_SUM, unit_roundoff(image.dtype)) * float(true_sum)
        budget += smallest
        assert abs(float(found[name]) - float(true)) <= budget, f"{name} {float(found[name])}, truth {float(true)}"

    base = dense_gradients(leaves(image, text, *scalars), **options) if base_line else []
    # the gradient of the smoothing is rounded separately and added
    roundings = 2 if options.get("label_smoothing") else 1
    for k, name in enumerate(names[:2]):
        true, true_sum = getattr(expected, name), getattr(expected, name + "_sum")
        check_gradient(name, found[name], true, true_sum, [gradients[k] for gradients in base], slack, roundings)
    return expected


def check_gradient(
    name: str, ours: Tensor, expected: Tensor, sums: Tensor, bases: list[Tensor], slack: float, roundings: int
) -> None:
    assert ours.isfinite().all(), f"{name} is not finite"
    error = (ours.double() - expected).norm()
    subnormal = (
        torch.finfo(ours.dtype).tiny * torch.finfo(ours.dtype).eps * ours.numel() ** 0.5
    )  # float16 flushes to zero below 6e-8
    if ours.dtype == torch.float32:
        budget = FP32_GRADIENT * expected.norm() + slack * FP32_SUM * sums.norm() + subnormal
    else:
        budget = roundings * unit_roundoff(ours.dtype) * sums.norm() + subnormal
    worst = tuple(int(k) for k in torch.unravel_index((ours.double() - expected).abs().argmax(), ours.shape))
    told = f"{name}{list(worst)}: ours {float(ours[worst]):.9g}, truth {float(expected[worst]):.9g}"
    if bases:
        told += f", dense {float(bases[0][worst]):.9g}"
    assert error <= budget, f"{told}; error {error:.2e}, promised {budget:.2e}"
    if bases:
        base_error = max((base.double() - expected).norm() for base in bases)
        allowed = DENSE_FACTOR * base_error + 2 * unit_roundoff(ours.dtype) * sums.norm() + subnormal
        assert error <= allowed, f"{told}; error {error:.2e}, dense {base_error:.2e}"


def pairs(M: int, N: int, D: int, *, aligned: float = 0.5, noise: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return fp32 features in which a share of the texts are their image plus noise, so that peaked and flat rows both
    occur. Each matrix lies inside a larger one filled with NaN, so that a read beyond an edge gives NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(M, D, generator=generator), torch.randn(N, D, generator=generator)
    both = torch.arange(min(M, N))[: round(aligned * min(M, N))]
    text[both] = image[both] + noise * text[both]
    return poisoned(image), poisoned(text)


def poisoned(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    x = x.to(dtype or x.dtype)
    frame = torch.full((x.shape[0] + 2, x.shape[1] + 3), torch.nan, dtype=x.dtype)
    inside = frame[1:-1, 1:-2]
    inside.copy_(x)
    return inside


def random_labels(M: int, N: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(M)
    return tuple(torch.randint(0, classes, (size,), generator=generator) for size in (M, N))


LABELS = {
    "unique": (torch.arange(90) * 7 % 90, torch.arange(90)),
    "many": random_labels(90, 600, 9),
    "rows without a positive": (torch.arange(70), torch.arange(40, 120)),
    "negative and large numbers": (torch.tensor([-(2**60), 5, 5, 2**60]), torch.tensor([2**60, 5, -(2**60), 7, 5])),
    "no negatives": (torch.zeros(5, dtype=torch.int64), torch.zeros(9, dtype=torch.int64)),
    "a row of only negatives and a text of all": (torch.tensor([1, 1, 2]), torch.tensor([1, 1])),
}


def counted_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the operations (2 M N D) of every matrix product from now on, and return their list."""
    operations: list[int] = []
    for name in ("mm", "addmm"):
        real = getattr(torch, name)

        def counted(*args: Tensor, real: Any = real, **kwargs: Any) -> Tensor:
            a, b = args[-2:]
            operations.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
            return real(*args, **kwargs)

        monkeypatch.setattr(torch, name, counted)
    return operations
