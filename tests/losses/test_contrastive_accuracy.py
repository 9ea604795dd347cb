"""The native CPU backend against fp64 truth and against dense torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastclip
from fastclip._backends.cpu import native
from support.accuracy import (
    LABELS,
    LOSS,
    check,
    dense_direction,
    direction,
    pairs,
    poisoned,
    random_labels,
    truth,
)

# (M, N, D) by regime of the kernels: tiles are 64 x 512 logits, vectors 16 or 8 columns
SHAPES = [
    (1, 1, 8),  # a single pair: no negatives
    (2, 2, 1),  # one-dimensional features
    (7, 7, 3),  # less than a vector
    (64, 64, 59),  # a full tile in rows; D not a multiple of anything
    (65, 65, 64),  # one row past a tile
    (512, 512, 16),  # a full tile in columns
    (513, 513, 32),  # one column past
    (130, 130, 640),  # RN50x4
    (96, 96, 1376),  # ALIGN
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What torch.empty returns is filled with NaN: an output that is not written is seen."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def cpu_loss(**options: object):
    if (labels := options.pop("labels", None)) is not None:
        options["image_labels"], options["text_labels"] = labels
    return lambda image, text, scale: fastclip.contrastive_loss(image, text, scale, backend="cpu", **options)


def test_truth_equals_cross_entropy() -> None:
    """The truth's own formula, where cross-entropy has digits."""
    z = 10 * torch.randn(9, 12, dtype=torch.float64)
    left_out = torch.rand(9, 12) < 0.2
    positive = (torch.randint(0, 3, (9, 1)) == torch.randint(0, 3, (12,))) & ~left_out
    for smoothing in (0.0, 0.1):
        found = (formula(z, positive, smoothing, left_out) for formula in (direction, dense_direction))
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("scale", [0.0, 1.0, 14.3, 100.0, -5.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradients_accurate(dtype: torch.dtype, shape: tuple[int, int, int], scale: float) -> None:
    image, text = (poisoned(x, dtype) for x in pairs(*shape))
    check(cpu_loss(), image, text, scale)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("labels", [False, True], ids=["diagonal", "labels"])
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_every_instruction_set_accurate(isa: str, labels: bool, scale: float) -> None:
    try:
        native.module.select_isa(isa)
    except ValueError:
        pytest.skip(f"this processor has no {isa}")
    try:
        assert native.module.isa() == isa
        image, text = pairs(130, 517, 24) if labels else pairs(517, 517, 24)
        y = random_labels(130, 517, 40) if labels else None
        check(cpu_loss(labels=y), image, text, scale, labels=y)
        spread = torch.logspace(-1, 1.5, len(image))[:, None]
        check(cpu_loss(labels=y, normalize=False), image * spread / 5, text / 5, 30.0, labels=y, normalize=False)
    finally:
        native.module.select_isa("auto")


@pytest.mark.parametrize(("noise", "loss"), [(0.12, 1e-9), (0.06, 1e-20)])
@pytest.mark.parametrize("labels", [False, True], ids=["diagonal", "unique labels"])
def test_confident_loss_keeps_digits(noise: float, loss: float, labels: bool) -> None:
    image, text = pairs(300, 300, 256, aligned=1.0, noise=noise)
    scale = 28.0 if loss > 1e-12 else 66.0
    y = (torch.arange(300) * 7 % 300,) * 2 if labels else None
    # dense fp32 has lost every digit here: gate B alone
    found = check(cpu_loss(labels=y), image, text, scale, labels=y, base_line=False)
    assert loss / 1e4 < float(found.loss) < loss * 1e1, "the case no longer tests what its name says"


def test_unnormalised_features_accurate() -> None:
    """Norms from 0.1 to 30 in one batch: the logits of a tile lie hundreds apart, one offset cannot serve them."""
    image, text = pairs(200, 200, 16)
    norms = torch.logspace(-1, 1.48, 200)
    image, text = image * (norms / image.norm(dim=1))[:, None], text * (norms.flip(0) / text.norm(dim=1))[:, None]
    for scale in (1.0, 5.0):
        check(cpu_loss(normalize=False), image, text, scale, normalize=False)


@pytest.mark.parametrize("megabytes", ["0.02", "0.3"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_blocks_accurate(monkeypatch: pytest.MonkeyPatch, megabytes: str, dtype: torch.dtype) -> None:
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", megabytes)
    image, text = (poisoned(x, dtype) for x in pairs(700, 700, 24))
    check(cpu_loss(), image, text, 20.0)


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize(
    "options", [{}, {"image_weight": 0.75}, {"label_smoothing": 0.1, "image_weight": 0.0}], ids=str
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_labels_accurate(name: str, options: dict[str, float], backend: str) -> None:
    labels = LABELS[name]
    image, text = pairs(len(labels[0]), len(labels[1]), 24)

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        y = {"image_labels": labels[0], "text_labels": labels[1]}
        return fastclip.contrastive_loss(image, text, scale, backend=backend, **y, **options)

    check(loss, image, text, 14.3, labels=labels, **options)


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_label_smoothing_accurate(smoothing: float, dtype: torch.dtype) -> None:
    image, text = (poisoned(x, dtype) for x in pairs(130, 130, 59))
    check(cpu_loss(label_smoothing=smoothing), image, text, 14.3, label_smoothing=smoothing)


def test_reductions_agree_with_truth() -> None:
    image, text = pairs(40, 50, 16)
    y = random_labels(40, 50, 30)
    z = 5.0 * (
        torch.nn.functional.normalize(image.double(), dim=1) @ torch.nn.functional.normalize(text.double(), dim=1).T
    )
    positive = y[0][:, None] == y[1]
    nothing = torch.zeros_like(positive)
    row, col = torch.zeros(40, dtype=torch.float64), torch.zeros(50, dtype=torch.float64)
    row[positive.any(1)] = direction(z, positive, 0.0, nothing)
    col[positive.any(0)] = direction(z.T, positive.T, 0.0, nothing.T)
    options = {"image_labels": y[0], "text_labels": y[1]}
    ours = fastclip.contrastive_loss(image, text, 5.0, reduction="none", **options)
    torch.testing.assert_close(ours, (row.float(), col.float()), rtol=LOSS, atol=1e-6)
    total = fastclip.contrastive_loss(image, text, 5.0, reduction="sum", image_weight=0.3, **options)
    torch.testing.assert_close(total, (0.3 * row.sum() + 0.7 * col.sum()).float(), rtol=LOSS, atol=0)


@pytest.mark.parametrize(("factor", "size"), [(-3.0, 1.0), (65536.0, 1.0), (1e25, 1.0), (1e-30, 1.0), (1e-37, 1e-6)])
def test_upstream_gradient_scales(factor: float, size: float) -> None:
    """From fp16 loss scaling to the subnormal weights of a mean over very many: they neither overflow nor flush."""
    image, text = (size * x for x in pairs(70, 70, 16))
    expected = truth(image, text, 14.3)
    image.requires_grad_()
    fastclip.contrastive_loss(image, text, 14.3).backward(torch.tensor(factor))
    error = (image.grad.double() / factor - expected.d_image).norm() / expected.d_image.norm()
    assert error < 3e-6


@pytest.mark.fault("zero rows, huge and tiny norms", "loss and gradients stay finite and right")
def test_extreme_norms_finite_and_accurate() -> None:
    image, text = pairs(66, 66, 16)
    factor = torch.ones(66, 1)
    factor[3], factor[7], factor[11] = 1e30, 1e20, 1e-6
    check(cpu_loss(), image * factor, text * factor.flip(0), 14.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_rows_finite(dtype: torch.dtype) -> None:
    image, text = (poisoned(x, dtype) for x in pairs(20, 20, 8))
    image[3], text[3], text[5] = 0, 0, 0
    a, b, s = image.clone().requires_grad_(), text.clone().requires_grad_(), torch.tensor(14.3, requires_grad=True)
    loss = fastclip.contrastive_loss(a, b, s)
    loss.backward()
    assert abs(float(loss.detach()) / float(truth(image, text, 14.3).loss) - 1) < LOSS
    if dtype != torch.float16:  # 14.3 / 1e-12 is no float16, as with torch.nn.functional.normalize
        assert a.grad.isfinite().all() and b.grad.isfinite().all()
    assert s.grad.isfinite()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_norm_below_the_bound_is_a_constant(backend: str) -> None:
    """As in torch.nn.functional.normalize: no projection of the gradient there."""
    image, text = pairs(20, 20, 8)
    image[3] *= 1e-14
    expected = truth(image, text, 14.3).d_image[3]
    image.requires_grad_()
    fastclip.contrastive_loss(image, text, 14.3, backend=backend).backward()
    assert (image.grad[3].double() - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.fault("NaN or Inf in the features", "they reach loss and gradients, nothing hides them")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 70])
@pytest.mark.parametrize("normalize", [True, False])
def test_nan_and_inf_propagate(value: float, place: int, normalize: bool) -> None:
    image, text = pairs(130, 130, 8)
    image[place, 2] = value
    image.requires_grad_()
    loss = fastclip.contrastive_loss(image, text, 14.3, normalize=normalize)
    assert not loss.isfinite()
    (gradient,) = torch.autograd.grad(loss, image)
    assert not gradient.isfinite().all()
