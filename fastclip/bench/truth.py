"""Value and gradients of both losses, rows by rows, in fp32 or fp64: right at sizes where no dense loss fits."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_BYTES = 1 << 30  # of one block of logits


@torch.no_grad()
def truth(loss: str, leaves: tuple[Tensor, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """The loss, and its gradients with respect to image (N, D), text (N, D), scale and, of the sigmoid loss, bias, all
    computed in `dtype`."""
    image, text, *scalars = (x.detach().to(dtype) for x in leaves)
    rows = max(1, BLOCK_BYTES // (4 * image.shape[0]))
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
        total += F.softplus(z).sum(dtype=torch.float64) - z.diagonal(start).sum(dtype=torch.float64)
        G = z.sigmoid_()
        G.diagonal(start).sub_(1)
        d_bias += G.sum(dtype=torch.float64)
        d_image[start : start + rows] = G @ text
        d_text.addmm_(G.T, block)
    return (*_scaled(total.float() / N, d_image, d_text, image, scale, N), d_bias.float() / N)


def _scaled(value: Tensor, d_image: Tensor, d_text: Tensor, image: Tensor, scale: Tensor, n: int) -> tuple[Tensor, ...]:
    """From sums of G times features; <image, d_image> is the scale's gradient times the scale."""
    d_scale = (image * d_image).sum(dtype=torch.float64).float() / n
    return value, d_image.mul_(scale / n), d_text.mul_(scale / n), d_scale
