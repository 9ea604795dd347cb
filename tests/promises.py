"""The promised tolerances, the truth they are measured against, and the comparison. Nothing here uses fastclip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOSS = 1e-5  # relative, from loss 19 to 1e-9 and below
FP32_GRADIENT = 3e-5  # relative Frobenius
SCALE_GRADIENT = 1e-4  # relative
DENSE_FACTOR = 2.0  # never worse than this times the dense formula in the same dtype
PEAK_MIB = 100  # beyond inputs and their gradients, at N = 16,384
FP32_SUM = 2.0**-21  # a few roundings of a sum of products, relative to the sum of their magnitudes


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


@dataclass
class Truth:
    """fp64 results, and `*_sum`: the sums of magnitudes that the gradients are made of."""

    loss: Tensor
    d_image: Tensor
    d_text: Tensor
    d_scale: Tensor
    d_image_sum: Tensor
    d_text_sum: Tensor
    d_scale_sum: Tensor


def _positives(M: int, N: int, labels: tuple[Tensor, Tensor] | None) -> Tensor:
    return torch.eye(M, N, dtype=torch.bool) if labels is None else labels[0][:, None] == labels[1]


def direction(z: Tensor, positive: Tensor, smoothing: float) -> Tensor:
    """Loss of every row of z with a positive: softplus keeps the digits of a small loss, in any dtype."""
    some = positive.any(1)
    z, positive = z[some], positive[some]
    count = positive.sum(1)
    low = torch.finfo(z.dtype).min / 4
    neg, pos = z.masked_fill(positive, low).logsumexp(1), z.masked_fill(~positive, low).logsumexp(1)
    mean_pos = torch.where(positive, z, 0).sum(1) / count
    gap = torch.where(count > 1, pos - mean_pos, 0)
    return F.softplus(neg - pos) + gap + smoothing * (mean_pos - z.mean(1))


def dense_direction(z: Tensor, positive: Tensor, smoothing: float) -> Tensor:
    """The same by torch's cross-entropy with probabilities as targets: what people write, and the base line."""
    some = positive.any(1)
    z, positive = z[some], positive[some]
    target = (1 - smoothing) * positive.to(z.dtype) / positive.sum(1, keepdim=True) + smoothing / z.shape[1]
    return F.cross_entropy(z, target, reduction="none")


def loss_of(
    z: Tensor, labels: tuple[Tensor, Tensor] | None, image_weight: float, smoothing: float, formula: Any
) -> Tensor:
    positive = _positives(*z.shape, labels)
    row, col = formula(z, positive, smoothing), formula(z.T, positive.T, smoothing)
    return image_weight * row.mean() + (1 - image_weight) * col.mean()


def truth(
    image: Tensor,
    text: Tensor,
    scale: float,
    *,
    normalize: bool = True,
    labels: tuple[Tensor, Tensor] | None = None,
    image_weight: float = 0.5,
    label_smoothing: float = 0.0,
) -> Truth:
    """The loss of the given (rounded) features and all gradients in fp64."""
    image, text = (x.detach().double().requires_grad_() for x in (image, text))
    s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    u, v = (F.normalize(x, dim=1) if normalize else x for x in (image, text))
    cosine = u @ v.T
    z = s * cosine
    loss = loss_of(z, labels, image_weight, label_smoothing, direction)
    g, d_image, d_text, d_scale = torch.autograd.grad(loss, (z, image, text, s))
    r, c = (1 / x.norm(dim=1).clamp_min(1e-12) if normalize else x.new_ones(len(x)) for x in (image, text))
    with torch.no_grad():
        sums = abs(scale) * r[:, None] * (g.abs() @ v.abs()), abs(scale) * c[:, None] * (g.abs().T @ u.abs())
        return Truth(loss.detach(), d_image, d_text, d_scale, *sums, (g * cosine).abs().sum())


def dense(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    *,
    normalize: bool = True,
    labels: tuple[Tensor, Tensor] | None = None,
    image_weight: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Dense torch in the features' own dtype."""
    u, v = (F.normalize(x, dim=1) if normalize else x for x in (image, text))
    z = scale.to(u.dtype) * u @ v.T
    return loss_of(z, labels, image_weight, label_smoothing, dense_direction)


def leaves(image: Tensor, text: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(image.dtype, torch.float32)
    copies = tuple(x.detach().clone().requires_grad_() for x in (image, text))
    return *copies, torch.tensor(scale, dtype=dtype, requires_grad=True)


def check(loss: Any, image: Tensor, text: Tensor, scale: float, *, base_line: bool = True, **options: Any) -> Truth:
    """`loss(image, text, scale)` and its gradients against the truth (gate B) and against dense torch (gate A).

    Gate A is for tensors only; scalars swing too much from seed to seed. It is left out where dense torch has no
    digits at all to compare with.
    """
    expected = truth(image, text, scale, **options)
    given = leaves(image, text, scale)
    value = loss(*given)
    found = dict(zip(("d_image", "d_text", "d_scale"), torch.autograd.grad(value, given)))
    value = value.detach()
    size = max(abs(scale), 1.0) if options.get("label_smoothing") else 0.0  # there a difference of means is added
    error = abs(float(value) - float(expected.loss))
    assert error <= LOSS * float(expected.loss) + FP32_SUM * size, f"loss {float(value)}, truth {float(expected.loss)}"

    d_scale_error = abs(float(found["d_scale"]) - float(expected.d_scale))
    budget = SCALE_GRADIENT * abs(float(expected.d_scale))
    budget += max(FP32_SUM, unit_roundoff(image.dtype)) * float(expected.d_scale_sum)
    assert d_scale_error <= budget, f"d_scale {float(found['d_scale'])}, truth {float(expected.d_scale)}"

    base = dict.fromkeys(found)
    if base_line:
        others = leaves(image, text, scale)
        base = dict(zip(found, torch.autograd.grad(dense(*others, **options), others)))
    for name in ("d_image", "d_text"):
        _check_gradient(name, found[name], getattr(expected, name), getattr(expected, name + "_sum"), base[name])
    return expected


def _check_gradient(name: str, ours: Tensor, expected: Tensor, sums: Tensor, base: Tensor | None) -> None:
    assert ours.isfinite().all(), f"{name} is not finite"
    error = (ours.double() - expected).norm()
    subnormal = (
        torch.finfo(ours.dtype).tiny * torch.finfo(ours.dtype).eps / 2 * ours.numel() ** 0.5
    )  # float16 flushes below 6e-8
    if ours.dtype == torch.float32:
        budget = FP32_GRADIENT * expected.norm() + FP32_SUM * sums.norm()
    else:
        budget = unit_roundoff(ours.dtype) * sums.norm() + subnormal
    worst = tuple(int(k) for k in torch.unravel_index((ours.double() - expected).abs().argmax(), ours.shape))
    told = f"{name}{list(worst)}: ours {float(ours[worst]):.9g}, truth {float(expected[worst]):.9g}"
    if base is not None:
        told += f", dense {float(base[worst]):.9g}"
    assert error <= budget, f"{told}; error {error:.2e}, promised {budget:.2e}"
    if base is not None:
        base_error = (base.double() - expected).norm()
        allowed = DENSE_FACTOR * base_error + 2 * unit_roundoff(ours.dtype) * sums.norm() + subnormal
        assert error <= allowed, f"{told}; error {error:.2e}, dense {base_error:.2e}"


def pairs(M: int, N: int, D: int, *, aligned: float = 0.5, noise: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """fp32 features, a share of the texts being their image plus noise: peaked and flat rows together. Each matrix
    lies inside a larger one filled with NaN: whoever reads past an edge gets NaN."""
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
