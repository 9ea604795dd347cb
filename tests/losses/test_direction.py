"""The contrastive loss of one direction (image_weight 1 or 0): accuracy, number of products, and torch's machinery."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastclip
from fastclip.parity.truth import truth
from support.accuracy import LABELS, check, counted_products, leaves, pairs, poisoned, random_labels
from support.kinds import CPU_KINDS, KINDS, SHAPES, Kind, each_kind, fp16, fp32, uneven

pytestmark = pytest.mark.usefixtures("poisoned_memory")
one_direction = pytest.mark.parametrize("weight", [1.0, 0.0])


# Accuracy


@pytest.mark.pairwise
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scale", [14.3, 100.0, -5.0, 0.0])
@pytest.mark.parametrize("regime", SHAPES)
@one_direction
@each_kind(KINDS)
def test_one_direction_accurate(kind: Kind, weight: float, regime: str, scale: float, reduction: str) -> None:
    image, text = kind.pairs(*kind.shape(regime))
    options: dict[str, Any] = {"image_weight": weight, "reduction": reduction}
    check(kind.loss(**options), image, text, scale, **options)


@pytest.mark.pairwise
@pytest.mark.parametrize("scale", [14.3, 100.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("labels", LABELS)
@one_direction
@each_kind(CPU_KINDS)
def test_one_direction_with_labels_accurate(
    kind: Kind, weight: float, labels: str, reduction: str, scale: float
) -> None:
    y = LABELS[labels]
    image, text = kind.pairs(len(y[0]), len(y[1]), 24)
    options: dict[str, Any] = {"image_weight": weight, "reduction": reduction}
    check(kind.loss(labels=y, **options), image, text, scale, labels=y, **options)


@one_direction
@each_kind(CPU_KINDS)
def test_one_direction_excludes_self_pairs(kind: Kind, weight: float) -> None:
    image, text = kind.pairs(90, 90, 24)
    y = (torch.arange(90) % 40, torch.arange(90) % 40)
    options: dict[str, Any] = {"image_weight": weight, "exclude_self": True}
    check(kind.loss(labels=y, **options), image, text, 14.3, labels=y, **options)


@pytest.mark.pairwise
@pytest.mark.parametrize(("noise", "loss"), [(0.12, 1e-9), (0.06, 1e-20)])
@pytest.mark.parametrize("labels", [False, True], ids=["diagonal", "unique labels"])
@one_direction
@each_kind(CPU_KINDS)
def test_one_direction_confident_loss_keeps_digits(
    kind: Kind, weight: float, labels: bool, noise: float, loss: float
) -> None:
    image, text = kind.pairs(150, 150, 256, aligned=1.0, noise=noise)
    y = (torch.arange(150) * 7 % 150,) * 2 if labels else None
    scale = 28.0 if loss > 1e-12 else 66.0
    # Dense fp32 has lost every digit here, so only gate B applies.
    found = check(
        kind.loss(labels=y, image_weight=weight), image, text, scale, labels=y, image_weight=weight, base_line=False
    )
    assert loss / 1e4 < float(found.loss) < loss * 1e1, "the case no longer tests what its name says"


@pytest.mark.pairwise
@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("labels", [False, True], ids=["diagonal", "labels"])
@one_direction
@each_kind(CPU_KINDS)
def test_one_direction_of_unnormalised_features_accurate(kind: Kind, weight: float, labels: bool, scale: float) -> None:
    M, N = (130, 200) if labels else (200, 200)
    image, text = (poisoned(x, kind.dtype) for x in uneven(M, N))
    y = random_labels(M, N, 30) if labels else None
    options: dict[str, Any] = {"normalize": False, "image_weight": weight}
    check(kind.loss(labels=y, **options), image, text, scale, labels=y, **options)


@one_direction
@each_kind(fp32(CPU_KINDS))
def test_one_direction_of_extreme_norms_accurate(kind: Kind, weight: float) -> None:
    factor = torch.ones(66, 1)
    factor[3], factor[7], factor[11] = 1e30, 1e20, 1e-6
    image, text = pairs(66, 66, 16)
    image, text = (poisoned(x) for x in (image * factor, text * factor.flip(0)))
    check(kind.loss(image_weight=weight), image, text, 10.0, image_weight=weight)


@one_direction
@each_kind(fp16(CPU_KINDS))
def test_one_direction_float16_gradient_of_a_mean_keeps_digits(kind: Kind, weight: float) -> None:
    """Gradients below float16's smallest number are kept in fp32 until a gradient scaler's factor is known."""
    image, text = kind.pairs(150, 150, 256, aligned=1.0, noise=0.12)
    expected = truth(image, text, 28.0, image_weight=weight)
    assert expected.d_image.abs().median() < 6e-8
    given = leaves(image, text, 28.0)
    (kind.loss(image_weight=weight)(*given) * 2.0**30).backward()
    error = (given[0].grad.double() / 2.0**30 - expected.d_image).norm() / expected.d_image_sum.norm()
    assert error < 2.0**-11


@pytest.mark.pairwise
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("labels", [False, True], ids=["diagonal", "labels"])
@one_direction
@each_kind(CPU_KINDS)
def test_one_direction_nan_and_inf_propagate(
    kind: Kind, weight: float, labels: bool, normalize: bool, value: float
) -> None:
    image, text = kind.pairs(130, 130, 8)
    image[70, 2] = value
    image.requires_grad_()
    y = (torch.arange(130) % 60,) * 2 if labels else None
    loss = kind.loss(labels=y, normalize=normalize, image_weight=weight)(image, text, torch.tensor(14.3))
    assert not loss.isfinite()
    (gradient,) = torch.autograd.grad(loss, image)
    assert not gradient.isfinite().all()


# Work


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("labels", [False, True], ids=["diagonal", "labels"])
@pytest.mark.parametrize("megabytes", ["64", "0.5"])
@one_direction
def test_one_direction_work_is_three_products(
    monkeypatch: pytest.MonkeyPatch, weight: float, megabytes: str, labels: bool, dtype: torch.dtype
) -> None:
    """The loss takes 2 M N D operations, or 6 M N D with gradients, in any number of panels, and all of them in the
    forward pass. The result of several panels is that of one.
    """
    M, N, D = (700, 1100, 16) if labels else (700, 700, 16)
    image, text = (x.to(dtype) for x in pairs(M, N, D))
    options: dict[str, Any] = {"image_weight": weight}
    if labels:
        options |= {"image_labels": torch.arange(M) % 300, "text_labels": torch.arange(N) % 300}
    expected = run(image, text, options)
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", megabytes)
    operations = counted_products(monkeypatch)
    given = leaves(image, text, 14.3)
    loss = fastclip.contrastive_loss(*given, **options)
    assert sum(operations) == 6 * M * N * D
    found = [loss.detach(), *torch.autograd.grad(loss, given)]
    assert sum(operations) == 6 * M * N * D
    operations.clear()
    with torch.no_grad():
        assert torch.equal(fastclip.contrastive_loss(*given, **options), found[0])
    assert sum(operations) == 2 * M * N * D
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-8)


@one_direction
def test_one_direction_with_few_rows_in_the_workspace_is_that_of_statistics(
    monkeypatch: pytest.MonkeyPatch, weight: float
) -> None:
    """If few whole rows fit into the workspace, the loss is computed from statistics, within the same bound."""
    image, text = pairs(700, 700, 16)
    expected = run(image, text, {"image_weight": weight})
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", "0.1")
    operations = counted_products(monkeypatch)
    for options in ({"image_weight": weight}, {"image_weight": weight, "reduction": "sum"}):
        operations.clear()
        found = run(image, text, options)
        assert sum(operations) > 6 * 700 * 700 * 16
        factor = 700 if "reduction" in options else 1
        for ours, theirs in zip(found, expected):
            torch.testing.assert_close(ours, factor * theirs, rtol=1e-5, atol=1e-7 * factor)


def run(image: Tensor, text: Tensor, options: dict[str, Any]) -> list[Tensor]:
    given = leaves(image, text, 14.3)
    loss = fastclip.contrastive_loss(*given, **options)
    return [loss.detach(), *torch.autograd.grad(loss, given)]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_one_direction_bitwise_repeatable(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        image, text = pairs(700, 700, 40)
        y = torch.arange(700) % 300
        for options in ({"image_weight": 1.0}, {"image_weight": 0.0, "image_labels": y, "text_labels": y}):
            results = [run(image, text, options) for _ in range(10)]
            for result in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))
    finally:
        torch.set_num_threads(before)


# Under torch's machinery


def problem(dtype: torch.dtype = torch.float32, N: int = 20) -> tuple[Tensor, ...]:
    return leaves(*(x.to(dtype) for x in pairs(N, N, 8)), 5.0)


def labelled(M: int, N: int) -> dict[str, Tensor]:
    return {"image_labels": torch.arange(M) % 7, "text_labels": torch.arange(N) % 9}


FORMS: dict[str, Callable[..., Tensor]] = {
    "images": lambda *x, **o: fastclip.contrastive_loss(*x, image_weight=1.0, **o),
    "texts": lambda *x, **o: fastclip.contrastive_loss(*x, image_weight=0.0, reduction="sum", normalize=False, **o),
    "labels": lambda *x, **o: fastclip.contrastive_loss(*x, image_weight=0.0, **labelled(len(x[0]), len(x[1])), **o),
}


@pytest.mark.pairwise
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("needs", [(True,) * 3, (False, True, False), (False, False, True), (False,) * 3], ids=str)
@pytest.mark.parametrize("labels", [False, True], ids=["diagonal", "labels"])
def test_direction_op_passes_opcheck(
    backend: str | None, dtype: torch.dtype, needs: tuple[bool, ...], labels: bool
) -> None:
    if backend == "cpu" and dtype == torch.float64:
        backend = None  # the automatic choice serves float64 with the reference
    given = [x.detach().requires_grad_(need) for x, need in zip(problem(dtype), needs)]
    y = torch.arange(20, dtype=torch.int32) % 7
    sides = (y, y, (y[:, None] == y).sum(1)) if labels else (None, None, None)
    divisor = torch.tensor(20)
    torch.library.opcheck(
        torch.ops.fastclip.direction_fwd, (*given, divisor, *sides, 0, False, True, backend, list(needs))
    )


@pytest.mark.parametrize("offset", [-3, 0, 5, 100])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_direction_offset_moves_the_positives(offset: int, backend: str) -> None:
    given = leaves(*pairs(20, 30, 8), 2.0)
    options = torch.tensor(3), None, None, None, offset, False, False, backend, [True] * 3
    out = torch.ops.fastclip.direction_fwd(*given, *options)
    i, t, s = (x.detach().double().requires_grad_() for x in given)
    z = s * i @ t.T
    own = torch.arange(20)[:, None] + offset == torch.arange(30)
    pos = torch.where(own, z, 0.0).sum(1)
    loss = torch.nn.functional.softplus(z.masked_fill(own, -torch.inf).logsumexp(1) - pos).sum() / 3
    for ours, theirs in zip(out, (loss, *torch.autograd.grad(loss, (i, t, s)))):
        torch.testing.assert_close(ours.double(), theirs.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("needed", [n for k in range(1, 4) for n in itertools.combinations(range(3), k)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_one_direction_every_subset_of_gradients(form: str, needed: tuple[int, ...]) -> None:
    given = problem()
    whole = torch.autograd.grad(FORMS[form](*given), given)
    some = [x.detach().requires_grad_(k in needed) for k, x in enumerate(given)]
    found = torch.autograd.grad(FORMS[form](*some), [some[k] for k in needed])
    for k, ours in zip(needed, found):
        assert torch.equal(ours, whole[k])


@pytest.mark.parametrize("compiler", [pytest.param("inductor", marks=pytest.mark.full), "aot_eager"])
@pytest.mark.parametrize("form", FORMS)
def test_one_direction_compiles_whole(form: str, compiler: str) -> None:
    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return FORMS[form](2 * image, text, scale.exp())

    compiled = torch.compile(loss, fullgraph=True, backend=compiler, dynamic=True)
    for N in (20, 33):
        given = *problem(N=N)[:2], torch.tensor(1.5, requires_grad=True)
        expected, found = loss(*given), compiled(*given)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        for ours, theirs in zip(torch.autograd.grad(found, given), torch.autograd.grad(expected, given)):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_one_direction_autocast_rounds_features_and_not_the_scale(backend: str, form: str) -> None:
    image, text, _ = problem()
    scale = torch.tensor(14.2857, requires_grad=True)
    rounded = [x.detach().bfloat16().requires_grad_() for x in (image, text)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = FORMS[form](image, text.bfloat16(), scale, backend=backend)
    expected = FORMS[form](*rounded, scale, backend=backend)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    ours = torch.autograd.grad(found, (image, scale))
    for a, b in zip(ours, torch.autograd.grad(expected, (rounded[0], scale))):
        assert torch.equal(a, b.float())


@pytest.mark.parametrize("form", FORMS)
def test_one_direction_reference_gradcheck_twice(form: str) -> None:
    given = problem(torch.float64, N=9)
    assert torch.autograd.gradcheck(lambda *x: FORMS[form](*x, backend="reference"), given)
    assert torch.autograd.gradgradcheck(lambda *x: FORMS[form](*x, backend="reference"), given)


@pytest.mark.parametrize("form", FORMS)
def test_one_direction_second_derivatives_of_cpu_raise(form: str) -> None:
    given = problem()
    (gradient,) = torch.autograd.grad(FORMS[form](*given, backend="cpu"), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"backend='cpu' has no second derivatives.*backend='reference'"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("form", FORMS)
def test_one_direction_under_transforms_is_that_of_eager_mode(form: str) -> None:
    """torch.func.grad, forward mode, a graph that is used twice, and batches of upstream gradients agree."""
    given = problem()
    loss = FORMS[form](*given)
    first = torch.autograd.grad(loss, given, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, given, retain_graph=True)):
        assert torch.equal(a, b)
    batch = torch.autograd.grad(loss, given, torch.tensor([1.0, -3.0]), is_grads_batched=True)
    plain = [x.detach() for x in given]
    functional = torch.func.grad(FORMS[form], argnums=(0, 1, 2))(*plain)
    _, tangent = torch.func.jvp(FORMS[form], tuple(plain), (torch.zeros(20, 8), torch.zeros(20, 8), torch.tensor(1.0)))
    torch.testing.assert_close(tangent, first[2], rtol=1e-4, atol=1e-6)
    for one, both, other in zip(first, batch, functional):
        torch.testing.assert_close(both, torch.stack([one, -3.0 * one]), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
