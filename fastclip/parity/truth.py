"""The truth that tests, `fastclip parity` and benchmarks compare with.

It uses no code of the package's losses. `truth` evaluates the dense formulas in float64. `blockwise_truth` evaluates
them block by block, in float32 or float64, for logits that do not fit into memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.parity import promised

__all__ = ["Truth", "blockwise_truth", "direction", "loss_of", "positives_of", "sigmoid_loss_of", "truth"]

BLOCK_BYTES = 1 << 30  # size of one block of logits
_LINEAR = 40.0  # above it softplus(x) is x even in float64; torch's default, 20, would lose seven digits
_EPS = 1e-12  # the smallest norm, as in torch.nn.functional.normalize


class Truth(NamedTuple):
    """Loss and gradients in float64, and the sums of the absolute values of the terms of each gradient."""

    loss: Tensor  # (), or (M + N,) for reduction="none"
    d_image: Tensor  # (M, D)
    d_text: Tensor  # (N, D)
    d_scale: Tensor  # ()
    d_image_sum: Tensor
    d_text_sum: Tensor
    d_scale_sum: Tensor
    d_bias: Tensor | None = None  # (), for the sigmoid loss
    d_bias_sum: Tensor | None = None

    @property
    def gradients(self) -> list[Tensor]:
        return [x for x in (self.d_image, self.d_text, self.d_scale, self.d_bias) if x is not None]

    @property
    def sums(self) -> list[Tensor]:
        parts = self.d_image_sum, self.d_text_sum, self.d_scale_sum, self.d_bias_sum
        return [x for x in parts if x is not None]


def truth(
    image: Tensor,
    text: Tensor,
    scale: float,
    *,
    normalize: bool = True,
    bias: float | None = None,
    upstream: Tensor | None = None,
    **options: Any,
) -> Truth:
    """Return loss and gradients of image (M, D) and text (N, D), which may have any dtype, in float64.

    Args:
        bias: bias of the sigmoid loss, or None for the contrastive loss.
        upstream: upstream gradient of the loss (default: 1).
        options: options of `loss_of`.
    """
    dtype = image.dtype
    image, text = (x.detach().double().requires_grad_() for x in (image, text))
    s, b = (torch.tensor(x, dtype=torch.float64, device=image.device, requires_grad=True) for x in (scale, bias or 0.0))
    u, v = (F.normalize(x, dim=1, eps=_EPS) if normalize else x for x in (image, text))
    cosine = u @ v.T
    z = s * cosine + b
    loss = loss_of(z, direction, **options) if bias is None else sigmoid_loss_of(z)
    G, d_image, d_text, d_scale, d_bias = torch.autograd.grad(loss, (z, image, text, s, b), upstream, retain_graph=True)
    magnitude = G.abs()
    if options.get("label_smoothing"):  # the magnitudes of the means over all rows, which are added and subtracted
        means = torch.autograd.grad(loss_of(z, smoothing_magnitude, **options), z, upstream)[0]
        magnitude = magnitude + means * (promised.FP32_MEAN / promised.FP32_SUM if dtype == torch.float32 else 1.0)
    with torch.no_grad():
        r, c = (1 / x.norm(dim=1, keepdim=True).clamp_min(_EPS) if normalize else 1.0 for x in (image, text))
        sums = abs(scale) * r * (magnitude @ v.abs()), abs(scale) * c * (magnitude.T @ u.abs())
        scalar = (magnitude * cosine).abs().sum()
        of_bias = () if bias is None else (d_bias, G.abs().sum())
    return Truth(loss.detach(), d_image, d_text, d_scale, *sums, scalar, *of_bias)


def direction(z: Tensor, positive: Tensor, smoothing: float, left_out: Tensor) -> Tensor:
    """Return the loss of every row of z that has a positive. softplus keeps the digits of small losses in any dtype."""
    has_positive = positive.any(1)
    z, positive, left_out = z[has_positive], positive[has_positive], left_out[has_positive]
    count, others = positive.sum(1), (~left_out).sum(1)
    low = torch.finfo(z.dtype).min / 4
    neg = z.masked_fill(positive | left_out, low).logsumexp(1)
    pos = z.masked_fill(~positive, low).logsumexp(1)
    mean_pos, mean = torch.where(positive, z, 0).sum(1) / count, torch.where(left_out, 0, z).sum(1) / others
    gap = torch.where(count > 1, pos - mean_pos, 0)
    return F.softplus(neg - pos, threshold=_LINEAR) + gap + smoothing * (mean_pos - mean)


def smoothing_magnitude(z: Tensor, positive: Tensor, smoothing: float, left_out: Tensor) -> Tensor:
    """Return the sum of the two means whose difference label smoothing adds to the loss of a row."""
    has_positive = positive.any(1)
    z, positive, left_out = z[has_positive], positive[has_positive], left_out[has_positive]
    mean_pos = torch.where(positive, z, 0).sum(1) / positive.sum(1)
    return smoothing * (mean_pos + torch.where(left_out, 0, z).sum(1) / (~left_out).sum(1))


def positives_of(z: Tensor, labels: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return the mask (M, N) of pairs with equal labels, or without labels of the pairs i = j."""
    if labels is None:
        return torch.eye(*z.shape, dtype=torch.bool, device=z.device)
    return (labels[0][:, None] == labels[1]).to(z.device)


def loss_of(
    z: Tensor,
    formula: Callable[[Tensor, Tensor, float, Tensor], Tensor],
    labels: tuple[Tensor, Tensor] | None = None,
    image_weight: float = 0.5,
    label_smoothing: float = 0.0,
    exclude_self: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Return the contrastive loss of logits z (M, N). `formula` computes the loss of rows, such as `direction`."""
    left_out = positives_of(z, None) & exclude_self
    positive = positives_of(z, labels) & ~left_out
    row = formula(z, positive, label_smoothing, left_out)
    col = formula(z.T, positive.T, label_smoothing, left_out.T)
    if reduction == "none":
        return torch.cat([row, col])
    row, col = (x.sum() if reduction == "sum" else x.mean() for x in (row, col))
    return image_weight * row + (1 - image_weight) * col


def sigmoid_loss_of(z: Tensor) -> Tensor:
    """Return SigLIP's loss of logits z (N, N), which include the bias."""
    return -F.logsigmoid((2 * torch.eye(*z.shape, dtype=z.dtype, device=z.device) - 1) * z).sum() / len(z)


@torch.no_grad()
def blockwise_truth(loss: str, leaves: tuple[Tensor, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Return the loss of pairs and its gradients: of image (N, D), text (N, D), scale and, for the sigmoid loss, bias.

    Args:
        loss: "softmax" or "sigmoid". Features are not normalised.
        dtype: float32 or float64, the dtype of the computation.
    """
    image, text, *scalars = (x.detach().to(dtype) for x in leaves)
    rows = max(1, BLOCK_BYTES // (image.element_size() * image.shape[0]))
    functions: dict[str, Callable[..., tuple[Tensor, ...]]] = {"softmax": _softmax, "sigmoid": _sigmoid}
    return functions[loss](image, text, rows, *scalars)


def _softmax(image: Tensor, text: Tensor, rows: int, scale: Tensor) -> tuple[Tensor, ...]:
    N = image.shape[0]
    row_lse = image.new_empty(N)
    col_lse = image.new_full((N,), -torch.inf)
    for start in range(0, N, rows):
        z = scale * image[start : start + rows] @ text.T
        row_lse[start : start + rows] = z.logsumexp(1)
        col_lse = torch.logaddexp(col_lse, z.logsumexp(0))
    positives = scale * (image * text).sum(1)
    value = (row_lse + col_lse).mean() / 2 - positives.mean()

    d_image, d_text = torch.empty_like(image), torch.zeros_like(text)
    for start in range(0, N, rows):
        block = image[start : start + rows]
        z = scale * block @ text.T
        G = (z - row_lse[start : start + rows, None]).exp_() + z.sub_(col_lse).exp_()
        G.diagonal(start).sub_(2)
        d_image[start : start + rows] = G @ text
        d_text.addmm_(G.T, block)
    return _scaled(value, d_image, d_text, image, scale, 2 * N)


def _sigmoid(image: Tensor, text: Tensor, rows: int, scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    N = image.shape[0]
    total, d_bias = image.new_zeros((), dtype=torch.float64), image.new_zeros((), dtype=torch.float64)
    d_image, d_text = torch.empty_like(image), torch.zeros_like(text)
    for start in range(0, N, rows):
        block = image[start : start + rows]
        z = scale * block @ text.T + bias
        total += F.softplus(z, threshold=_LINEAR).sum(dtype=torch.float64) - z.diagonal(start).sum(dtype=torch.float64)
        G = z.sigmoid_()
        G.diagonal(start).sub_(1)
        d_bias += G.sum(dtype=torch.float64)
        d_image[start : start + rows] = G @ text
        d_text.addmm_(G.T, block)
    return *_scaled((total / N).to(z.dtype), d_image, d_text, image, scale, N), (d_bias / N).to(z.dtype)


def _scaled(value: Tensor, d_image: Tensor, d_text: Tensor, image: Tensor, scale: Tensor, n: int) -> tuple[Tensor, ...]:
    """Return the loss and the gradients, given G @ text and G.T @ image, where G / n are the derivatives of the logits.

    With the final d_image, scale * d_scale = <image, d_image>, so d_scale needs no further product.
    """
    d_scale = ((image * d_image).sum(dtype=torch.float64) / n).to(image.dtype)
    return value, d_image.mul_(scale / n), d_text.mul_(scale / n), d_scale
