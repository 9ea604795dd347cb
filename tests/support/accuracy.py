"""The promised tolerances, the truth they are measured against, and the comparison. Nothing here uses fastclip."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

LOSS = 1e-5  # relative, from loss 19 to 1e-9 and below
FP32_GRADIENT = 3e-5  # relative Frobenius
SCALE_GRADIENT = 1e-4  # relative
TENSOR_CORES = 2.0**-27  # of a logit, times scale and D: their sums truncate (2^-28 was seen)
DENSE_FACTOR = 2.0  # never worse than this times the dense formula in the same dtype
PEAK_MIB = 100  # beyond inputs and their gradients, at N = 16,384 and less
FP32_SUM = 2.0**-21  # a few roundings of a sum of products, relative to the sum of their magnitudes
COLLAPSED = 4.0  # times as much where all features are one: equal terms round in one direction
FP32_MEAN = 2.0**-18  # likewise of label smoothing's means over all rows


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
    d_bias: Tensor | None = None  # of the sigmoid loss
    d_bias_sum: Tensor | None = None


def _positives(M: int, N: int, labels: tuple[Tensor, Tensor] | None) -> Tensor:
    return torch.eye(M, N, dtype=torch.bool) if labels is None else labels[0][:, None] == labels[1]


def direction(z: Tensor, positive: Tensor, smoothing: float, left_out: Tensor) -> Tensor:
    """Loss of every row of z with a positive: softplus keeps the digits of a small loss, in any dtype."""
    some = positive.any(1)
    z, positive, left_out = z[some], positive[some], left_out[some]
    count, others = positive.sum(1), (~left_out).sum(1)
    low = torch.finfo(z.dtype).min / 4
    neg = z.masked_fill(positive | left_out, low).logsumexp(1)
    pos = z.masked_fill(~positive, low).logsumexp(1)
    mean_pos, mean = torch.where(positive, z, 0).sum(1) / count, torch.where(left_out, 0, z).sum(1) / others
    gap = torch.where(count > 1, pos - mean_pos, 0)
    return F.softplus(neg - pos) + gap + smoothing * (mean_pos - mean)


def dense_direction(z: Tensor, positive: Tensor, smoothing: float, left_out: Tensor) -> Tensor:
    """The same by torch's cross-entropy with probabilities as targets: what people write, and the base line."""
    some = positive.any(1)
    z, positive, left_out = z[some], positive[some], left_out[some]
    target = (1 - smoothing) * positive.to(z.dtype) / positive.sum(1, keepdim=True)
    target = target + smoothing * (~left_out).to(z.dtype) / (~left_out).sum(1, keepdim=True)
    return F.cross_entropy(z.masked_fill(left_out, torch.finfo(z.dtype).min / 4), target, reduction="none")


def smoothing_magnitude(z: Tensor, positive: Tensor, smoothing: float, left_out: Tensor) -> Tensor:
    """What label smoothing adds to the loss is a difference of means; this is their sum, for its magnitude."""
    some = positive.any(1)
    z, positive, left_out = z[some], positive[some], left_out[some]
    mean_pos = torch.where(positive, z, 0).sum(1) / positive.sum(1)
    return smoothing * (mean_pos + torch.where(left_out, 0, z).sum(1) / (~left_out).sum(1))


def loss_of(
    z: Tensor,
    formula: Any,
    labels: tuple[Tensor, Tensor] | None = None,
    image_weight: float = 0.5,
    label_smoothing: float = 0.0,
    exclude_self: bool = False,
) -> Tensor:
    """The contrastive loss of logits z (M, N)."""
    left_out = torch.eye(*z.shape, dtype=torch.bool) & exclude_self
    positive = _positives(*z.shape, labels) & ~left_out
    row = formula(z, positive, label_smoothing, left_out)
    col = formula(z.T, positive.T, label_smoothing, left_out.T)
    return image_weight * row.mean() + (1 - image_weight) * col.mean()


def sigmoid_loss_of(z: Tensor) -> Tensor:
    """SigLIP's loss of logits z (N, N), the bias in them."""
    return -F.logsigmoid((2 * torch.eye(*z.shape, dtype=z.dtype) - 1) * z).sum() / len(z)


def truth(
    image: Tensor, text: Tensor, scale: float, *, normalize: bool = True, bias: float | None = None, **options: Any
) -> Truth:
    """The loss of the given (rounded) features and all gradients in fp64: the sigmoid loss if it has a bias."""
    dtype = image.dtype
    image, text = (x.detach().double().requires_grad_() for x in (image, text))
    s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(bias or 0.0, dtype=torch.float64, requires_grad=True)
    u, v = (F.normalize(x, dim=1) if normalize else x for x in (image, text))
    cosine = u @ v.T
    z = s * cosine + b
    loss = loss_of(z, direction, **options) if bias is None else sigmoid_loss_of(z)
    g, d_image, d_text, d_scale, d_bias = torch.autograd.grad(loss, (z, image, text, s, b), retain_graph=True)
    magnitude = g.abs()
    if options.get("label_smoothing"):
        means = torch.autograd.grad(loss_of(z, smoothing_magnitude, **options), z)[0]
        magnitude = magnitude + means * (FP32_MEAN / FP32_SUM if dtype == torch.float32 else 1.0)
    r, c = (1 / x.norm(dim=1).clamp_min(1e-12) if normalize else x.new_ones(len(x)) for x in (image, text))
    with torch.no_grad():
        sums = abs(scale) * r[:, None] * (magnitude @ v.abs()), abs(scale) * c[:, None] * (magnitude.T @ u.abs())
        found = Truth(loss.detach(), d_image, d_text, d_scale, *sums, (magnitude * cosine).abs().sum())
        if bias is not None:
            found.d_bias, found.d_bias_sum = d_bias, g.abs().sum()
        return found


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
    """Dense torch in the features' own dtype; the scale multiplies the images, or the cosines."""
    u, v = (F.normalize(x, dim=1) if normalize else x for x in (image, text))
    scale = scale.to(u.dtype)
    z = scale * (u @ v.T) if scale_last else scale * u @ v.T
    return loss_of(z, dense_direction, **options) if bias is None else sigmoid_loss_of(z + bias.to(u.dtype))


def dense_gradients(given: tuple[Tensor, ...], **options: Any) -> list[tuple[Tensor, ...]]:
    """Gradients of dense torch in each of the orders in which people, and processors, multiply and add.

    Its error swings by a factor of two between them where logits are large: the largest is what it may have.
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
    """`loss(image, text, scale)` and its gradients against the truth (gate B) and against dense torch (gate A).

    With a bias it is the sigmoid loss, `loss(image, text, scale, bias)`. Gate A is for tensors only; scalars swing too
    much from seed to seed. It is left out where dense torch has no digits at all to compare with. `slack` widens
    FP32_SUM. logit_error: of a positive's logit, hence of a solved batch's loss, relative.
    """
    expected = truth(image, text, scale, bias=bias, **options)
    scalars = (scale,) if bias is None else (scale, bias)
    names = ("d_image", "d_text", "d_scale", "d_bias")[: 2 + len(scalars)]
    given = leaves(image, text, *scalars)
    value = loss(*given)
    found = dict(zip(names, torch.autograd.grad(value, given)))
    value = value.detach()
    size = max(abs(scale), 1.0) if options.get("label_smoothing") else 0.0  # there a difference of means is added
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
    roundings = 2 if options.get("label_smoothing") else 1  # its gradient is rounded apart, and added
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
    )  # float16 flushes below 6e-8
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
    """The operations of every matrix product from now on, 2 M N D each."""
    operations: list[int] = []
    for name in ("mm", "addmm"):
        real = getattr(torch, name)

        def counted(*args: Tensor, real: Any = real, **kwargs: Any) -> Tensor:
            a, b = args[-2:]
            operations.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
            return real(*args, **kwargs)

        monkeypatch.setattr(torch, name, counted)
    return operations
