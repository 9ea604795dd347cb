"""The contrastive loss of every backend and dtype, compared with the fp64 truth and with dense torch.

A default run takes a few cases of each matrix; `pytest --full` takes all. Cases that concern one backend alone are in
tests/backends.
"""

from __future__ import annotations

import pytest
import torch

import fastclip
from fastclip.parity.promised import LOSS
from fastclip.parity.truth import direction, truth
from support.accuracy import LABELS, check, dense_direction, pairs, poisoned, random_labels
from support.kinds import CPU_KINDS, KINDS, REFERENCE, SHAPES, WAYS, Kind, each_kind, fp16, fp32, uneven, wide

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_truth_equals_cross_entropy() -> None:
    """The formula of the fp64 truth agrees with cross-entropy where cross-entropy still has digits."""
    z = 10 * torch.randn(9, 12, dtype=torch.float64)
    left_out = torch.rand(9, 12) < 0.2
    positive = (torch.randint(0, 3, (9, 1)) == torch.randint(0, 3, (12,))) & ~left_out
    for smoothing in (0.0, 0.1):
        found = (formula(z, positive, smoothing, left_out) for formula in (direction, dense_direction))
        torch.testing.assert_close(*found)


@pytest.mark.pairwise
@pytest.mark.parametrize("scale", [14.3, 100.0, 1.0, -5.0, 0.0])
@pytest.mark.parametrize("regime", SHAPES)
@each_kind(WAYS)
def test_loss_and_gradients_accurate(kind: Kind, regime: str, scale: float) -> None:
    image, text = kind.pairs(*kind.shape(regime))
    check(kind.loss(), image, text, scale)


@pytest.mark.pairwise
@pytest.mark.parametrize(("noise", "loss"), [(0.12, 1e-9), (0.06, 1e-20)])
@pytest.mark.parametrize("labels", [False, True], ids=["diagonal", "unique labels"])
@each_kind(WAYS)
def test_confident_loss_keeps_digits(kind: Kind, noise: float, loss: float, labels: bool) -> None:
    image, text = kind.pairs(150, 150, 256, aligned=1.0, noise=noise)
    y = (torch.arange(150) * 7 % 150,) * 2 if labels else None
    scale = 28.0 if loss > 1e-12 else 66.0
    logit_error = kind.logit_error(scale, 256) if labels else 0.0
    # Dense fp32 has lost every digit here, so only gate B applies.
    found = check(kind.loss(labels=y), image, text, scale, labels=y, base_line=False, logit_error=logit_error)
    assert loss / 1e4 < float(found.loss) < loss * 1e1, "the case no longer tests what its name says"


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@each_kind(WAYS)
def test_weights_of_directions_accurate(kind: Kind, weight: float) -> None:
    """The weights of the two directions are applied to the right side: the added texts make a column's loss differ from
    its row's.
    """
    image, text = kind.pairs(40, 40, 24)
    check(kind.loss(image_weight=weight), image, text + 0.5 * text[:1], 14.3, image_weight=weight)


@pytest.mark.pairwise
@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("labels", [False, True], ids=["diagonal", "labels"])
@each_kind(WAYS)
def test_unnormalised_features_accurate(request: pytest.FixtureRequest, kind: Kind, labels: bool, scale: float) -> None:
    """The loss stays accurate when the logits of one tile are hundreds apart, so that one offset cannot serve all of
    them.
    """
    launches = request.getfixturevalue("launches") if kind.for_gpus else None
    M, N = (130, 200) if labels else (200, 200)
    image, text = (poisoned(x, kind.dtype) for x in uneven(M, N))
    y = random_labels(M, N, 30) if labels else None
    check(kind.loss(labels=y, normalize=False), image, text, scale, labels=y, normalize=False)
    if launches is not None:
        assert launches.repaired == [True, True], "forward and backward must have needed it"


OPTIONS = [
    {},
    {"image_weight": 0.75},
    {"label_smoothing": 0.1, "image_weight": 0.0},
    {"label_smoothing": 0.1, "image_weight": 0.25},
]


@pytest.mark.pairwise
@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@each_kind([*KINDS, REFERENCE])
def test_labels_accurate(kind: Kind, name: str, options: dict[str, float]) -> None:
    labels = LABELS[name]
    image, text = kind.pairs(len(labels[0]), len(labels[1]), 24)
    check(kind.loss(labels=labels, **options), image, text, 14.3, labels=labels, **options)


# Pairs of N (or the regime of its shape) and the number of classes.
SELF_PAIRS = [(3, 1), (9, 4), ("past a tile", 20), ("past columns", 700)]


@pytest.mark.pairwise
@pytest.mark.parametrize(("N", "classes"), SELF_PAIRS)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "image_weight": 0.75}], ids=str)
@each_kind([*KINDS, REFERENCE])
def test_excluded_self_pairs_accurate(kind: Kind, N: int | str, classes: int, options: dict[str, float]) -> None:
    """A row's own column is neither positive nor negative (SimCLR, SupCon). Of 700 classes, most have a single row."""
    N = kind.shape(N)[0] if isinstance(N, str) else N
    y = torch.randint(0, classes, (N,), generator=torch.Generator().manual_seed(0))
    image, text = kind.pairs(N, N, 24)
    options = {"labels": (y, y), "exclude_self": True, **options}
    check(kind.loss(**options), image, text, 14.3, **options)


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
@each_kind(KINDS)
def test_label_smoothing_accurate(kind: Kind, smoothing: float) -> None:
    image, text = kind.pairs(130, 130, 59)
    check(kind.loss(label_smoothing=smoothing), image, text, 14.3, label_smoothing=smoothing)


@pytest.mark.parametrize("scale", [1.0, 14.3])
@pytest.mark.parametrize("smoothing", [0.99, 1.0])
@each_kind([Kind("cpu", torch.bfloat16), Kind("cpu", torch.float16)])
def test_label_smoothing_near_one_accurate_in_16_bits(kind: Kind, smoothing: float, scale: float) -> None:
    """The gradient of strong smoothing is the difference of two nearly equal gradients, each of them rounded to 16
    bits.
    """
    image, text = kind.pairs(130, 130, 59)
    y = torch.arange(130) % 40
    for options in ({}, {"labels": (y, y)}, {"labels": (y, y), "exclude_self": True}):
        check(kind.loss(label_smoothing=smoothing, **options), image, text, scale, label_smoothing=smoothing, **options)


@pytest.mark.parametrize("size", [1e-13, 1e19, 1e30])
@pytest.mark.parametrize("exclude_self", [False, True])
@each_kind(wide([*CPU_KINDS, REFERENCE]))
def test_label_smoothing_of_extreme_norms_accurate(kind: Kind, exclude_self: bool, size: float) -> None:
    """Label smoothing is accurate for features whose squares overflow or underflow float32."""
    image, text = (size * x for x in kind.pairs(40, 40, 16))
    y = torch.arange(40) % 11
    options = {"labels": (y, y), "exclude_self": exclude_self, "label_smoothing": 0.3}
    check(kind.loss(**options), image, text, 14.3, base_line=False, **options)


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


# The last factor is the smallest normal float32.
@pytest.mark.parametrize(
    ("factor", "size"), [(-3.0, 1.0), (65536.0, 1.0), (1e25, 1.0), (1e-30, 1.0), (2.0**-126, 1e-6)]
)
@each_kind(wide(WAYS))
def test_upstream_gradient_scales(kind: Kind, factor: float, size: float) -> None:
    """Gradients neither overflow nor flush to zero under upstream factors, from those of fp16 loss scaling to the
    subnormal weights of a mean over very many pairs.
    """
    image, text = (size * x for x in kind.pairs(30, 30, 16))
    expected = truth(image, text, 14.3)
    image.requires_grad_()
    kind.loss()(image, text, torch.tensor(14.3)).backward(torch.tensor(factor))
    error = (image.grad.double() / factor - expected.d_image).norm() / expected.d_image.norm()
    assert error < kind.tolerance(3e-6, 2e-3)


@each_kind(wide(WAYS))
def test_gradients_of_a_loss_below_float32_keep_digits(kind: Kind) -> None:
    """A loss of 1e-40 has weights below the smallest normal float32; a large upstream factor brings its gradients back
    with their digits.
    """
    image, text = kind.pairs(30, 30, 512, aligned=1.0, noise=0.0)
    expected = truth(image, text, 108.0)
    assert 1e-46 < expected.loss < 1e-37
    image.requires_grad_()
    kind.loss()(image, text, torch.tensor(108.0)).backward(torch.tensor(2.0**60))
    error = (image.grad.double() / 2.0**60 - expected.d_image).norm() / expected.d_image.norm()
    assert error < kind.tolerance(3e-5, 2e-3)


@pytest.mark.parametrize("scale", [1e8, 3e9, 1e20, -1e13])
@pytest.mark.parametrize("labels", [False, True], ids=["diagonal", "labels"])
@each_kind(wide(kind for kind in WAYS if not kind.for_gpus))
def test_enormous_scales_accurate(kind: Kind, labels: bool, scale: float) -> None:
    """The rounding error of such a logit exceeds what exp2 can represent: the sums must not become infinite, and the
    row maximum must not vanish.
    """
    image, text = kind.pairs(70, 70, 16)
    y = (torch.arange(70) % 23,) * 2 if labels else None
    check(kind.loss(labels=y), image, text, scale, labels=y, base_line=False)


@pytest.mark.parametrize(("size", "factor"), [(1.0, 2.0**16), (300.0, 2.0**16), (2.0**-8, 2.0**-10)])
@each_kind(fp16(WAYS))
def test_fp16_weights_do_not_flush(kind: Kind, size: float, factor: float) -> None:
    """The weights of a mean loss are 1 / N^2. With the inverse norms of rows of norm 300 they are 1e-10, below the
    range of fp16, and must not flush to zero.
    """
    image, text = ((size * x / x.norm(dim=1, keepdim=True)).half() for x in pairs(200, 200, 16))
    image.requires_grad_()
    (kind.loss()(image, text, torch.tensor(5.0)) * factor).backward()
    expected = truth(image, text, 5.0)
    error = (image.grad.double() / factor - expected.d_image).norm() / expected.d_image.norm()
    assert error < 2e-3


@pytest.mark.fault("Features have zero rows, or huge or tiny norms", "Loss and gradients stay finite and accurate")
@each_kind(fp32(WAYS))
def test_extreme_norms_finite_and_accurate(kind: Kind) -> None:
    image, text = pairs(66, 66, 16)
    factor = torch.ones(66, 1)
    factor[3], factor[7], factor[11] = 1e30, 1e20, 1e-6
    image, text = (poisoned(x) for x in (image * factor, text * factor.flip(0)))
    check(kind.loss(), image, text, 14.3)


@each_kind(WAYS)
def test_zero_rows_finite(kind: Kind) -> None:
    image, text = kind.pairs(20, 20, 8)
    image[3], text[3], text[5] = 0, 0, 0
    a, b, s = image.clone().requires_grad_(), text.clone().requires_grad_(), torch.tensor(14.3, requires_grad=True)
    loss = kind.loss()(a, b, s)
    loss.backward()
    expected = truth(image, text, 14.3)
    assert abs(float(loss.detach()) / float(expected.loss) - 1) < LOSS
    others = torch.arange(20) != 3
    error = (a.grad.double() - expected.d_image)[others].norm() / expected.d_image[others].norm()
    assert error < kind.tolerance(1e-5, 2e-3), "a zero row spoils the others"
    assert s.grad.isfinite()
    if kind.dtype != torch.float16:  # 14.3 / 1e-12 overflows float16, as it does in torch.nn.functional.normalize
        assert a.grad.isfinite().all() and b.grad.isfinite().all()


@each_kind([*wide(WAYS), REFERENCE])
def test_norm_below_the_bound_is_a_constant(kind: Kind) -> None:
    """A norm below the bound is a constant, as in torch.nn.functional.normalize: the gradient is not
    projected there.
    """
    image, text = kind.pairs(20, 20, 8)
    image[3] *= 1e-14
    expected = truth(image, text, 14.3).d_image[3]
    image.requires_grad_()
    kind.loss()(image, text, torch.tensor(14.3)).backward()
    assert (image.grad[3].double() - expected).norm() < kind.tolerance(1e-5, 1e-3) * expected.norm()


@pytest.mark.fault("Features contain NaN or Inf", "They appear in the loss and the gradients and are not hidden")
@pytest.mark.pairwise
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("place", [0, 70, 129])  # in the first, the second and the last tile of 64 rows
@each_kind(WAYS)
def test_nan_and_inf_propagate(kind: Kind, value: float, normalize: bool, place: int) -> None:
    image, text = kind.pairs(130, 130, 8)
    image[place, 2] = value
    image.requires_grad_()
    loss = kind.loss(normalize=normalize)(image, text, torch.tensor(14.3))
    assert not loss.isfinite()
    (gradient,) = torch.autograd.grad(loss, image)
    assert not gradient.isfinite().all()
