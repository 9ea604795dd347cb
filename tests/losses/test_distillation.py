"""The distillation loss of every backend and dtype, compared with the fp64 formula and with open_clip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastclip
from fastclip._backends.cpu import blocks, native
from fastclip.parity.promised import FP32_SUM, LOSS, SCALE_GRADIENT
from fastclip.parity.truth import Truth
from support.accuracy import check_gradient, counted_products, leaves, pairs, poisoned, unit_roundoff
from support.kinds import CPU_KINDS, KINDS, REFERENCE, SHAPES, Kind, each_kind

pytestmark = pytest.mark.usefixtures("poisoned_memory")
WAYS = [*KINDS, REFERENCE]
BACKENDS = ["cpu", "reference"]
Teachers = tuple[list[Tensor], list[Tensor], list[float]]


def dense_losses(z: Tensor, logits: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the loss of every row and of every column of z, for the logits of teachers."""
    found = []
    for dim in (1, 0):
        target = torch.stack([t.softmax(dim) for t in logits]).mean(0)
        found.append(-(target * z.log_softmax(dim)).sum(dim))
    return found[0], found[1]


def dense_logits(image: Tensor, text: Tensor, scale: Any, normalize: bool = True) -> Tensor:
    u, v = (F.normalize(x, dim=1, eps=1e-12) if normalize else x for x in (image, text))
    return scale * u @ v.T


def truth(
    image: Tensor, text: Tensor, scale: float, teachers: Teachers, image_weight: float = 0.5, normalize: bool = True
) -> Truth:
    """Return loss, gradients and the sums of the absolute values of their terms in fp64.

    The derivative of the logit of a pair is the difference of the probabilities of its negatives.
    """
    i, t, s = (x.detach().double().requires_grad_() for x in leaves(image, text, scale))
    z = dense_logits(i, t, s, normalize)
    logits = [dense_logits(a.double(), b.double(), c, normalize) for a, b, c in zip(*teachers)]
    rows, cols = dense_losses(z, logits)
    loss = image_weight * rows.mean() + (1 - image_weight) * cols.mean()
    d_image, d_text, d_scale = torch.autograd.grad(loss, (i, t, s), retain_graph=True)
    with torch.no_grad():
        magnitude = torch.zeros_like(z)
        for weight, dim in ((image_weight, 1), (1 - image_weight, 0)):
            terms = z.softmax(dim) + sum(x.softmax(dim) for x in logits) / len(logits)
            magnitude += weight / len(z) * terms.fill_diagonal_(0.0)
            magnitude += torch.diag(weight / len(z) * terms.sum(dim))
        r, c = (1 / x.norm(dim=1, keepdim=True).clamp_min(1e-12) if normalize else 1.0 for x in (i, t))
        u, v = i * r, t * c
        sums = abs(scale) * r * (magnitude @ v.abs()), abs(scale) * c * (magnitude.T @ u.abs())
        return Truth(loss.detach(), d_image, d_text, d_scale, *sums, (magnitude * (u @ v.T)).abs().sum())


def teachers_of(N: int, *sizes: int, noise: float = 0.5, dtypes: Sequence[torch.dtype] = (torch.float32,)) -> Teachers:
    """Return one teacher for each D, with half of the pairs aligned."""
    features = [pairs(N, N, D, noise=noise, aligned=0.75, seed=7 + D) for D in sizes]
    images, texts = ([poisoned(x, dtypes[k % len(dtypes)]) for k, x in enumerate(side)] for side in zip(*features))
    return images, texts, [12.0 + 20.0 * k for k in range(len(sizes))]


def check(kind: Kind, image: Tensor, text: Tensor, scale: float, teachers: Teachers, **options: Any) -> Truth:
    expected = truth(image, text, scale, teachers, **options)
    given = leaves(image, text, scale)
    lists = [[x.to(kind.device) for x in side] for side in teachers[:2]]
    value = fastclip.distillation_loss(
        *(x.to(kind.device) for x in given), *lists, teachers[2], backend=kind.backend, **options
    )
    d_image, d_text, d_scale = torch.autograd.grad(value, given)
    assert value.dtype == torch.float32
    error = abs(float(value.detach()) - float(expected.loss))
    assert error <= LOSS * float(expected.loss) + 1e-38, f"loss {float(value)}, truth {float(expected.loss)}"
    budget = SCALE_GRADIENT * abs(float(expected.d_scale)) + 1e-38
    budget += max(FP32_SUM, unit_roundoff(image.dtype)) * float(expected.d_scale_sum)
    assert abs(float(d_scale) - float(expected.d_scale)) <= budget
    check_gradient("d_image", d_image, expected.d_image, expected.d_image_sum, [], 1.0, 1)
    check_gradient("d_text", d_text, expected.d_text, expected.d_text_sum, [], 1.0, 1)
    return expected


@pytest.mark.pairwise
@pytest.mark.parametrize("scale", [14.3, 100.0, -5.0, 0.0])
@pytest.mark.parametrize("regime", SHAPES)
@pytest.mark.parametrize("sizes", [(24,), (8, 70, 1)], ids=str)
@each_kind(WAYS)
def test_loss_and_gradients_accurate(kind: Kind, regime: str, scale: float, sizes: tuple[int, ...]) -> None:
    N, _, D = kind.shape(regime)
    image, text = kind.pairs(N, N, D)
    others = [] if kind.backend == "cuda" else [torch.float32]  # which does not support it
    check(kind, image, text, scale, teachers_of(N, *sizes, dtypes=[kind.dtype, *others]))


@pytest.mark.pairwise
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("image_weight", [0.0, 0.3, 1.0])
@each_kind(WAYS)
def test_options_accurate(kind: Kind, image_weight: float, normalize: bool) -> None:
    image, text = kind.pairs(70, 70, 24)
    teachers = teachers_of(70, 16, dtypes=[kind.dtype])
    check(kind, image, text, 3.0, teachers, image_weight=image_weight, normalize=normalize)


@each_kind(WAYS)
def test_confident_loss_keeps_digits(kind: Kind) -> None:
    image, text = kind.pairs(150, 150, 256, aligned=1.0, noise=0.12)
    a, b = kind.pairs(150, 150, 200, aligned=1.0, noise=0.1, seed=5)
    found = check(kind, image, text, 28.0, ([a], [b], [28.0]))
    assert 1e-12 < float(found.loss) < 1e-7, "the case no longer tests what its name says"


@each_kind(WAYS)
def test_gradient_of_a_student_that_equals_its_teacher_is_small(kind: Kind) -> None:
    image, text = kind.pairs(130, 130, 24)
    given = leaves(image, text, 14.3)
    d_image, d_text, d_scale = torch.autograd.grad(
        fastclip.distillation_loss(*given, image, text, 14.3, backend=kind.backend), given
    )
    expected = truth(image, text, 14.3, ([image], [text], [14.3]))
    assert d_image.norm() <= 1e-5 * expected.d_image_sum.norm()
    assert d_text.norm() <= 1e-5 * expected.d_text_sum.norm()
    assert abs(float(d_scale)) <= 1e-5 * float(expected.d_scale_sum)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_accurate_on_every_instruction_set(isa: str) -> None:
    try:
        native.module.select_isa(isa)
    except ValueError:
        pytest.skip(f"this processor has no {isa}")
    try:
        for scale in (20.0, 900.0):  # logits too far apart for one exponential
            image, text = pairs(530, 530, 24)
            a, b, _ = teachers_of(530, 16)
            check(CPU_KINDS[0], image, text, 20.0, (a, b, [scale]))
    finally:
        native.module.select_isa("auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accurate_in_many_blocks(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", "0.05")
    image, text = (poisoned(x, dtype) for x in pairs(700, 700, 24))
    check(Kind("cpu", dtype), image, text, 20.0, teachers_of(700, 16, 40, dtypes=(dtype,)))


@pytest.mark.parametrize(("megabytes", "most"), [("0.05", 12), ("64", 10)])
def test_work_is_six_products_at_most(monkeypatch: pytest.MonkeyPatch, megabytes: str, most: int) -> None:
    """Forward and backward take at most 12 M N D operations with a teacher of the same D, and 4 M N D more for each
    further teacher. The forward pass may leave the student's only block in the workspace.
    """
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", megabytes)
    given = leaves(*pairs(700, 700, 16), 14.3)
    operations = counted_products(monkeypatch)
    for count in (1, 2):
        operations.clear()
        fastclip.distillation_loss(*given, *teachers_of(700, *[16] * count)).backward()
        unit = 700 * 700 * 16
        assert (6 + 4 * count) * unit <= sum(operations) <= (most + 4 * (count - 1)) * unit
    assert blocks.workspace.size * 4 <= float(megabytes) * 2**20


def test_runs_bitwise_repeatable() -> None:
    given, teachers = leaves(*pairs(700, 700, 16), 14.3), teachers_of(700, 16)
    losses = [fastclip.distillation_loss(*given, *teachers) for _ in range(3)]
    results = [[loss, *torch.autograd.grad(loss, given, retain_graph=True)] for loss in (*losses, losses[0])]
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_reductions_agree(backend: str) -> None:
    image, text = pairs(48, 48, 8)
    teachers = teachers_of(48, 5, 9)

    def loss(**options: Any) -> Any:
        return fastclip.distillation_loss(image, text, 9.0, *teachers, backend=backend, **options)

    row, col = loss(reduction="none")
    z, logits = dense_logits(image, text, 9.0), [dense_logits(*x) for x in zip(*teachers)]
    torch.testing.assert_close((row, col), dense_losses(z, logits), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(loss(image_weight=0.3), 0.3 * row.mean() + 0.7 * col.mean())
    torch.testing.assert_close(loss(image_weight=0.3, reduction="sum"), 0.3 * row.sum() + 0.7 * col.sum())


@pytest.mark.parametrize("backend", BACKENDS)
def test_single_pair_has_no_loss(backend: str) -> None:
    given = leaves(*pairs(1, 1, 8), 14.3)
    loss = fastclip.distillation_loss(*given, *teachers_of(1, 8), backend=backend)
    assert loss == 0.0
    assert all(not d.any() for d in torch.autograd.grad(loss, given))


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_that_are_not_finite_stay(backend: str) -> None:
    """A NaN in a row of the student or of the teacher makes the losses of the row and of all columns NaN."""
    for side in range(2):
        image, text = pairs(70, 70, 8)
        a, b, c = teachers_of(70, 8)
        (image, a[0])[side][3, 2] = torch.nan
        row, col = fastclip.distillation_loss(image, text, 9.0, a, b, c, backend=backend, reduction="none")
        assert row[3].isnan() and col.isnan().all() and row[4:].isfinite().all()


def test_kept_block_is_the_forward_pass_own() -> None:
    """The backward pass does not take the block of another loss, with or without a teacher, for its own."""
    image, text = pairs(400, 400, 16)
    teachers = teachers_of(400, 16)
    given = leaves(image, text, 14.3)
    expected = torch.autograd.grad(fastclip.distillation_loss(*given, *teachers), given)
    for other in (
        lambda: fastclip.contrastive_loss(text, image, 14.3),
        lambda: fastclip.distillation_loss(text, image, 14.3, *teachers),
    ):
        loss = fastclip.distillation_loss(*given, *teachers)
        other()
        for a, b in zip(torch.autograd.grad(loss, given), expected):
            assert torch.equal(a, b)
    contrastive = fastclip.contrastive_loss(*given)
    alone = torch.autograd.grad(contrastive, given, retain_graph=True)
    contrastive = fastclip.contrastive_loss(*given)
    fastclip.distillation_loss(text, image, 14.3, *teachers)
    for a, b in zip(torch.autograd.grad(contrastive, given), alone):
        assert torch.equal(a, b)
