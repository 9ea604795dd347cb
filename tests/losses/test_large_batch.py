"""Losses of more pairs than a signed 32-bit integer counts: N^2 > 2^31.

With D = 1 and few distinct feature values, the fp64 truth is a small sum over values, each times its count.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastclip
from fastclip.parity.promised import FP32_GRADIENT, LOSS, SCALE_GRADIENT

N = 46_400
VALUES = 50


def features() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return image and text features (N, 1) and the index of each one's value."""
    assert N * N > 2**31
    image_value, text_value = torch.arange(N) * 7 % VALUES, torch.arange(N) * 11 % VALUES + torch.arange(N) % 3
    image, text = ((2 * k / VALUES - 0.97).float()[:, None] for k in (image_value, text_value))
    return image, text, image_value, text_value


def by_value(x: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct values (V,) in fp64 and the count of each."""
    count = torch.bincount(value).double()
    first = torch.zeros(len(count), dtype=torch.float64)
    first[value] = x[:, 0].double()
    return first, count


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    error = (ours.double() - theirs).norm() / theirs.norm()
    assert error < tolerance, f"relative error {error:.1e}"


@pytest.mark.parametrize("labels", [False, True], ids=["pairs", "unique labels"])
def test_loss_of_more_than_two_to_the_31_pairs(labels: bool) -> None:
    image, text, image_value, text_value = features()
    scale = 3.0
    (a, a_count), (b, b_count) = by_value(image, image_value), by_value(text, text_value)
    own = scale * (image * text)[:, 0].double()

    def direction(x: Tensor, others: Tensor, count: Tensor) -> Tensor:
        """Return the loss of every row, and the mean of `others` under its softmax."""
        e = count * (scale * x.double() * others).exp()
        return e.sum(1).log() - own, (e * others).sum(1) / e.sum(1)

    row, text_mean = direction(image, b, b_count)
    col, image_mean = direction(text, a, a_count)
    expected = 0.5 * (row.mean() + col.mean())
    # dL/d image_i has two parts: the softmax of image i over the texts, and its share in the texts' softmaxes.
    col_norm = (a_count * (scale * b[:, None] * a).exp()).sum(1)
    row_norm = (b_count * (scale * a[:, None] * b).exp()).sum(1)
    from_cols = (b_count / col_norm * b * (scale * image.double() * b).exp()).sum(1)
    from_rows = (a_count / row_norm * a * (scale * text.double() * a).exp()).sum(1)
    d_image = 0.5 * scale / N * (text_mean - text[:, 0].double() + from_cols - text[:, 0].double())
    d_text = 0.5 * scale / N * (image_mean - image[:, 0].double() + from_rows - image[:, 0].double())

    given = image.requires_grad_(), text.requires_grad_(), torch.tensor(scale, requires_grad=True)
    y = {"image_labels": torch.arange(N), "text_labels": torch.arange(N)} if labels else {}
    loss = fastclip.contrastive_loss(*given, normalize=False, backend="cpu", **y)
    found = torch.autograd.grad(loss, given)
    assert abs(loss.item() / expected.item() - 1) < LOSS
    assert_close(found[0][:, 0], d_image, FP32_GRADIENT)
    assert_close(found[1][:, 0], d_text, FP32_GRADIENT)
    assert_close(found[2], (image.detach()[:, 0].double() * d_image).sum() / scale, SCALE_GRADIENT)


def test_sigmoid_loss_of_more_than_two_to_the_31_pairs() -> None:
    image, text, image_value, text_value = features()
    scale, bias = 3.0, -4.0
    (a, a_count), (b, b_count) = by_value(image, image_value), by_value(text, text_value)
    own = scale * (image * text)[:, 0].double() + bias
    z = scale * a[:, None] * b + bias
    pairs = a_count[:, None] * b_count
    expected = ((pairs * F.softplus(z)).sum() + (F.softplus(-own) - F.softplus(own)).sum()) / N
    g = (scale * image.double() * b + bias).sigmoid() * b_count  # every pair counted as a negative
    d_image = scale / N * ((g * b).sum(1) - text[:, 0].double())  # a positive's weight is sigmoid(own) - 1
    d_bias = ((pairs * z.sigmoid()).sum() - N) / N

    given = image.requires_grad_(), text, torch.tensor(scale), torch.tensor(bias, requires_grad=True)
    loss = fastclip.sigmoid_loss(*given, normalize=False, backend="cpu")
    found = torch.autograd.grad(loss, (given[0], given[3]))
    assert abs(loss.item() / expected.item() - 1) < LOSS
    assert_close(found[0][:, 0], d_image, FP32_GRADIENT)
    assert_close(found[1], d_bias, SCALE_GRADIENT)


def test_stats_of_more_than_two_to_the_31_pairs() -> None:
    image, text, _, text_value = features()
    image = image.abs() + 0.1  # every image is closest to the largest text
    found = fastclip.contrastive_stats(image, text, 3.0, normalize=False, backend="cpu")
    best = text_value == text_value.max()
    assert best.sum() > 1 and not found.row_hit.any()  # many texts share the largest value: ties
    text[N - 1] = 9.0  # now a single text is largest
    found = fastclip.contrastive_stats(image, text, 3.0, normalize=False, backend="cpu")
    assert found.row_hit.nonzero().tolist() == [[N - 1]]
