"""multiview_loss against the sum of dense losses over pairs of views."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastclip
from fastclip.parity.promised import LOSS
from fastclip.parity.truth import direction, loss_of
from support.accuracy import pairs


def views_of(count: int, N: int = 30, D: int = 16, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    first, _ = pairs(N, N, D)
    generator = torch.Generator().manual_seed(3)
    return [(first + 0.5 * torch.randn(N, D, generator=generator)).to(dtype).requires_grad_() for _ in range(count)]


def dense(views: list[Tensor], scale: Tensor, chosen: list[tuple[int, int]], **options: object) -> Tensor:
    units = [torch.nn.functional.normalize(x, dim=1) for x in views]
    return sum(loss_of(scale * units[i] @ units[j].T, direction, **options) for i, j in chosen)


ALL = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
CORE_2 = [(2, 0), (2, 1), (2, 3)]


@pytest.mark.pairwise
@pytest.mark.parametrize("backend", ["cpu", "reference", None])
@pytest.mark.parametrize(("core", "chosen"), [(None, ALL), (2, CORE_2), (0, [(0, 1), (0, 2), (0, 3)])])
@pytest.mark.parametrize("labelled", [False, True])
def test_multiview_equals_sum_of_pairs(
    core: int | None, chosen: list[tuple[int, int]], labelled: bool, backend: str | None
) -> None:
    dtype = torch.float64 if backend is None else torch.float32
    views, truths = views_of(4, dtype=dtype), views_of(4, dtype=torch.float64)
    for x, y in zip(views, truths):
        y.data.copy_(x.data)
    scale, true_scale = (torch.tensor(9.0, dtype=d, requires_grad=True) for d in (dtype, torch.float64))
    y = torch.arange(30) % 11 if labelled else None
    options = {"image_weight": 0.75, "label_smoothing": 0.1}
    loss = fastclip.multiview_loss(views, scale, core=core, labels=y, backend=backend, **options)
    expected = dense(truths, true_scale, chosen, labels=(y, y) if labelled else None, **options)
    torch.testing.assert_close(loss.double(), expected, rtol=LOSS, atol=0)
    found = torch.autograd.grad(loss, (*views, scale))
    for ours, theirs in zip(found, torch.autograd.grad(expected, (*truths, true_scale))):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-7)


def test_two_views_are_the_loss() -> None:
    image, text = views_of(2)
    assert torch.equal(fastclip.multiview_loss((image, text)), fastclip.contrastive_loss(image, text))
    total = fastclip.multiview_loss((image, text), reduction="sum")
    assert torch.equal(total, fastclip.contrastive_loss(image, text, reduction="sum"))


def test_one_tensor_of_views() -> None:
    views = views_of(3)
    assert torch.equal(fastclip.multiview_loss(torch.stack(views)), fastclip.multiview_loss(views))


def test_views_of_any_iterable() -> None:
    views = views_of(3)
    expected = fastclip.multiview_loss(views)
    for iterable in ((x for x in views), dict(enumerate(views)).values(), tuple(views)):
        assert torch.equal(fastclip.multiview_loss(iterable), expected)


def test_multiview_compiles_whole() -> None:
    views = views_of(3)
    compiled = torch.compile(fastclip.multiview_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(views, 5.0, core=1), fastclip.multiview_loss(views, 5.0, core=1))


X = torch.randn(4, 8)
ERRORS = {
    "one view": ([X], {}, ValueError, "at least two views, got 1"),
    "none": ([], {}, ValueError, "at least two views, got 0"),
    "shapes": ([X, X, X[:3]], {}, ValueError, r"views\[0\] \(4, 8\) float32 on cpu and views\[2\] \(3, 8\)"),
    "dtypes": ([X, X.double()], {}, ValueError, r"views\[1\] \(4, 8\) float64"),
    "numpy": ([X, X.numpy()], {}, TypeError, r"views\[1\] must be a torch\.Tensor, got ndarray"),
    "a dict": (
        {"a": X, "b": X},
        {},
        TypeError,
        r"views must be an iterable of feature tensors, got dict: pass its values\(\)",
    ),
    "no views": (None, {}, TypeError, r"views\[0\] must be a torch\.Tensor, got NoneType"),
    "a matrix": (X, {}, ValueError, r"one tensor of views must be \(V, N, D\): views \(4, 8\)"),
    "core": ([X, X], {"core": 2}, ValueError, "core must be the index of one of 2 views, got 2"),
    "negative core": ([X, X], {"core": -1}, ValueError, "got -1"),
    "none reduction": ([X, X], {"reduction": "none"}, ValueError, "'mean' or 'sum', got 'none'"),
    "two kinds of labels": ([X, X], {"image_labels": torch.arange(4)}, TypeError, "takes labels="),
    "labels": ([X, X], {"labels": torch.arange(3)}, ValueError, r"image_labels \(3,\)"),
    "unknown option": ([X, X], {"temperature": 1.0}, TypeError, "temperature"),
    "vectors": ([X[0], X[0]], {}, ValueError, "must be matrices"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_multiview_misfit_raises(name: str) -> None:
    views, options, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        fastclip.multiview_loss(views, **options)
