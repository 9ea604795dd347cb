"""Negatives far above the positive are left out with `negative_margin`, compared with the dense formula in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastclip
from fastclip._backends import cuda, reference
from fastclip._backends.cpu import native
from fastclip._backends.problem import Problem, SideGrads, in_turn
from fastclip.losses.inputs.ties import TIE
from fastclip.ops.contrastive import arguments, by_side, flat
from fastclip.parity.promised import FP32_GRADIENT, FP64, LOSS
from support.accuracy import counted_products, leaves, pairs, poisoned, random_labels, unit_roundoff
from support.kinds import DEVICE, GPU, each_backend

BACKENDS = ["cpu", "reference", "triton"]
SCALE = 14.3
LABELS = random_labels(140, 150, 60)


def dense(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    margin: float,
    labels: tuple[Tensor, Tensor] | None = None,
    normalize: bool = True,
    exclude_self: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the losses of the images and of the texts, from the whole matrix of logits."""
    u, v = (F.normalize(x, dim=1) if normalize else x for x in (image, text))
    z = scale * u @ v.T
    itself = torch.eye(*z.shape, dtype=torch.bool)
    positive = itself if labels is None else labels[0][:, None] == labels[1]
    positive, either = (positive & ~itself, ~itself) if exclude_self else (positive, torch.ones_like(positive))
    row_norm, col_norm = (x.detach().norm(dim=1) for x in (u, v))
    ties = (TIE * abs(scale.detach()) * x for x in (row_norm * col_norm.max(), col_norm * row_norm.max()))
    losses = []
    negative = either & ~positive
    for x, pos, other, tie in zip((z, z.T), (positive, positive.T), (negative, negative.T), ties):
        count = pos.sum(1)
        mean = torch.where(pos, x, 0).sum(1) / count.clamp_min(1)
        limit = torch.where(count > 0, mean, torch.inf) + margin * abs(scale) + tie
        kept = other & (x <= limit[:, None])
        has_positive = count > 0
        neg = x.masked_fill(~kept, -torch.inf)[has_positive].logsumexp(1)
        pos_lse = x.masked_fill(~pos, -torch.inf)[has_positive].logsumexp(1)
        loss = x.new_zeros(len(x))
        loss[has_positive] = F.softplus(neg - pos_lse, threshold=64) + pos_lse - mean[has_positive]
        losses.append(loss)
    return losses[0], losses[1]


def device_of(backend: str | None) -> str:
    return DEVICE if backend == "triton" else "cpu"


def total(losses: tuple[Tensor, Tensor]) -> Tensor:
    """Return a sum that weighs all losses differently."""
    return sum((torch.linspace(0.5, 1.5, len(x), dtype=x.dtype, device=x.device) * x).mean() for x in losses)  # type: ignore[return-value]


def spread(M: int, N: int, D: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return features whose pairs match well, badly, or not at all, so that every row has other negatives."""
    image, text = pairs(M, N, D, noise=1.5)
    return poisoned(image, dtype), poisoned(text, dtype)


def check(
    image: Tensor, text: Tensor, margin: float, labels: Any = None, backend: str | None = None, **options: Any
) -> None:
    """Compare loss and gradients with `dense` in fp64."""
    scale = SCALE if options.get("normalize", True) else 0.7
    given = tuple(x.detach().to(device_of(backend)).requires_grad_() for x in leaves(image, text, scale))
    dtype = given[2].dtype
    exact = tuple(x.detach().double().cpu().requires_grad_() for x in given)
    named = dict(zip(("image_labels", "text_labels"), (y.to(device_of(backend)) for y in labels or ())))
    found = fastclip.contrastive_loss(
        *given, negative_margin=margin, reduction="none", backend=backend, **named, **options
    )
    expected = dense(*exact, margin, labels, **options)
    without = dense(*exact, 1e6, labels, **options)
    assert any((a != b).any() for a, b in zip(expected, without)), "no negative is left out"
    budget = LOSS if dtype == torch.float32 else FP64
    for ours, true in zip(found, expected):
        torch.testing.assert_close(ours.double().cpu(), true, rtol=budget, atol=budget)
    budget = FP32_GRADIENT if dtype == torch.float32 else FP64
    for ours, true in zip(torch.autograd.grad(total(found), given), torch.autograd.grad(total(expected), exact)):
        error = float((ours.double().cpu() - true).norm())
        assert error <= (budget + 2 * unit_roundoff(ours.dtype)) * float(true.norm()), (error, float(true.norm()))


@pytest.mark.pairwise
@each_backend(*BACKENDS)
@pytest.mark.parametrize("margin", [-0.2, 0.0, 0.1])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", [(2, 2, 8), (65, 65, 24), (530, 530, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_loss_is_that_of_the_remaining_pairs(
    dtype: torch.dtype, shape: tuple[int, int, int], normalize: bool, margin: float, backend: str
) -> None:
    image, text = spread(*shape, dtype)
    if backend == "triton" and not GPU:
        if dtype == torch.bfloat16:
            pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
        shape = min(shape, (130, 130, 40))  # several tiles; the interpreter is slow
    if shape[0] == 2:
        text = image.flip(0)  # every negative is above its positive
    check(image, text, margin, backend=None if dtype == torch.float64 else backend, normalize=normalize)


@each_backend(*BACKENDS, None)
@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"exclude_self": True}], ids=str)
def test_loss_with_labels_is_that_of_the_remaining_pairs(options: dict[str, Any], backend: str | None) -> None:
    M, N = (140, 140) if options.get("exclude_self") else (140, 150)
    image, text = spread(M, N, 24, torch.float32 if backend else torch.float64)
    labels = LABELS[0], LABELS[1][:N]
    assert not torch.isin(labels[0], labels[1]).all(), "every row has a positive"
    check(image, text, 0.05, labels, backend, **options)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_every_instruction_set_leaves_out_the_same_pairs(isa: str) -> None:
    try:
        native.module.select_isa(isa)
    except ValueError:
        pytest.skip(f"this processor has no {isa}")
    try:
        check(*spread(530, 530, 24), 0.0)
        check(*spread(140, 150, 24), 0.05, LABELS)
    finally:
        native.module.select_isa("auto")


def test_many_blocks_leave_out_the_same_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", "0.05")
    check(*spread(530, 530, 24), 0.0)


@each_backend(*BACKENDS)
@pytest.mark.parametrize("scale", [100.0, 3000.0])
def test_logits_that_are_left_out_do_not_overflow(scale: float, backend: str) -> None:
    """A pair far above the log-sum-exps of its row and column has no weight, where exp(z - lse) is infinite."""
    unit = torch.eye(8, device=device_of(backend))
    image = unit[:4].requires_grad_()
    text = (unit[4:] + 1e-3 * unit[:4] + unit[[1, 0, 3, 2]]).requires_grad_()
    losses = fastclip.contrastive_loss(image, text, scale, negative_margin=0.1, reduction="none", backend=backend)
    exact = dense(image.double().cpu(), text.double().cpu(), torch.tensor(scale, dtype=torch.float64), 0.1)
    torch.testing.assert_close(torch.cat(losses).double().cpu(), torch.cat(exact), rtol=1e-4, atol=1e-6)
    for d in torch.autograd.grad(total(losses), (image, text)):
        assert d.isfinite().all()


@each_backend(*BACKENDS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tie_stays_a_negative(dtype: torch.dtype, normalize: bool, backend: str) -> None:
    """A caption that occurs twice is a negative of its image: rounding does not leave it out."""
    if backend == "triton" and dtype == torch.bfloat16 and not GPU:
        dtype = torch.float16  # which Triton's interpreter multiplies
    half = 300 if backend != "triton" else 70  # the interpreter is slow
    image, text = (x.to(device_of(backend), dtype) for x in pairs(2 * half, 2 * half, 59, aligned=1.0, noise=0.3))
    text[half:] = text[:half]
    options = {"normalize": normalize, "reduction": "none", "backend": backend}
    scale = SCALE if normalize else 1.0
    ours = fastclip.contrastive_loss(image, text, scale, negative_margin=0.0, **options)
    everything = fastclip.contrastive_loss(image, text, scale, **options)
    assert (ours[0][:half] >= math.log(2) - 1e-3).all()
    torch.testing.assert_close(ours[0][:half], everything[0][:half], rtol=1e-4, atol=1e-5)


def near_limits(M: int, N: int, backend: str) -> list[Tensor]:
    """Return the sums of the softmax weights of all rows and of all columns, where rounding decides which pairs count.

    All logits are within a few roundings of all limits, and there is no positive. The first number of all features is
    1, so that the gradient with respect to it is the sum of the weights times the scale.
    """
    generator = torch.Generator().manual_seed(0)
    image, text = (
        torch.randn(1, 64, generator=generator) + 1e-6 * torch.randn(n, 64, generator=generator) for n in (M, N)
    )
    image[:, 0] = text[:, 0] = 1.0
    image, text = (x.to(device_of(backend)) for x in (image, text))
    scale = torch.tensor(1 / 0.07, device=image.device)
    z = scale * image @ text.T
    problem = Problem(image, text, scale, offset=10**6, normalize=False, limits=(z.median(1)[0], z.median(0)[0]))
    stats = by_side(torch.ops.fastclip.contrastive_fwd(*arguments(problem, backend)))
    totals = []
    for k in range(2):
        grads = [SideGrads(*(torch.zeros_like(x) for x in (side.neg, side.pos, side.pos_lse))) for side in stats]
        grads[k].neg.fill_(1.0)
        out = torch.ops.fastclip.contrastive_bwd(
            *arguments(problem, backend), list(flat(stats)), in_turn(*grads), [True] * 3
        )
        totals.append(out[k][:, 0] / scale)
    return totals


@pytest.mark.parametrize("workspace", ["64", "0.05"])
@each_backend(*BACKENDS)
def test_both_passes_decide_alike_near_the_limit(backend: str, workspace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", workspace)
    shape = (300, 530) if backend != "triton" else (130, 150)
    for sums in near_limits(*shape, backend):
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-5, atol=0.0)


@each_backend(*BACKENDS)
def test_nan_stays_nan(backend: str) -> None:
    image, text = (x.to(device_of(backend)) for x in pairs(70, 70, 16))
    text[3, 2] = torch.nan
    row, col = fastclip.contrastive_loss(image, text, negative_margin=0.0, reduction="none", backend=backend)
    assert row.isnan().all() and col[3].isnan()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("labels", [False, True])
def test_ops_pass_opcheck(backend: str, labels: bool) -> None:
    image, text = (x.requires_grad_() for x in pairs(20, 20, 8))
    y = (torch.arange(20, dtype=torch.int32) % 7, torch.arange(20, dtype=torch.int32) % 5) if labels else (None, None)
    options = *y, 0, False, True, backend, torch.linspace(-3, 3, 20), torch.linspace(2, -2, 20)
    args = image, text, torch.tensor(5.0, requires_grad=True), *options
    torch.library.opcheck(torch.ops.fastclip.contrastive_fwd, args)
    detached = *(x.detach() for x in args[:3]), *options
    torch.library.opcheck(torch.ops.fastclip.contrastive_maxima, detached)
    stats = torch.ops.fastclip.contrastive_fwd(*detached)
    grads = [torch.rand_like(x) for x in stats[:6]]
    torch.library.opcheck(torch.ops.fastclip.contrastive_bwd, (*detached, list(stats), grads, [True] * 3))


@pytest.mark.parametrize("labels", [None, LABELS], ids=["diagonal", "labels"])
def test_reference_passes_gradgradcheck(labels: tuple[Tensor, Tensor] | None) -> None:
    """The choice of pairs is constant near the features, which are drawn at random."""
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(6, 5, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    scale = torch.tensor(30.0, dtype=torch.float64, requires_grad=True)
    y = {} if labels is None else {"image_labels": torch.arange(6) % 4, "text_labels": torch.arange(6) % 3}

    def loss(*given: Tensor) -> Any:
        return fastclip.contrastive_loss(*given, negative_margin=0.0, backend="reference", **y)

    assert torch.autograd.gradcheck(loss, (image, text, scale))
    assert torch.autograd.gradgradcheck(loss, (image, text, scale))
    by_func = torch.func.grad(loss, argnums=(0, 1))(image, text, scale)
    for a, b in zip(by_func, torch.autograd.grad(loss(image, text, scale), (image, text))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("labels", [False, True])
def test_compiles_whole(labels: bool) -> None:
    image, text = pairs(20, 20, 8, noise=1.5)
    y = {"image_labels": torch.arange(20) % 7, "text_labels": torch.arange(20) % 5} if labels else {}

    def loss(image: Tensor, text: Tensor) -> Any:
        return fastclip.contrastive_loss(image, text, 20.0, negative_margin=0.05, **y)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    given = image.requires_grad_(), text.requires_grad_()
    torch.testing.assert_close(compiled(*given), loss(*given))
    for a, b in zip(torch.autograd.grad(compiled(*given), given), torch.autograd.grad(loss(*given), given)):
        torch.testing.assert_close(a, b)


def test_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without labels the forward takes one product, with labels one more."""
    image, text = pairs(300, 300, 16)
    operations = counted_products(monkeypatch)
    fastclip.contrastive_loss(image, text, negative_margin=0.1)
    assert len(operations) == 1
    y = torch.arange(300) % 100
    fastclip.contrastive_loss(image, text, negative_margin=0.1, image_labels=y, text_labels=y)
    assert len(operations) == 3


def test_stats_and_views_leave_out_the_same_pairs() -> None:
    image, text = spread(130, 130, 24)
    found = fastclip.contrastive_stats(image, text, SCALE, negative_margin=0.0)
    losses = fastclip.contrastive_loss(image, text, SCALE, negative_margin=0.0, reduction="none")
    assert torch.equal(found.row_loss, losses[0]) and torch.equal(found.col_loss, losses[1])
    everything = fastclip.contrastive_stats(image, text, SCALE)
    assert (found.row_lse < everything.row_lse).any() and (found.row_lse <= everything.row_lse).all()
    assert (found.row_hit >= everything.row_hit).all()
    views = fastclip.multiview_loss([image, text], SCALE, negative_margin=0.0)
    assert torch.equal(views, fastclip.contrastive_loss(image, text, SCALE, negative_margin=0.0))


def test_what_does_not_fit_is_refused() -> None:
    x = torch.randn(4, 8)
    for value, error, words in (
        (math.nan, ValueError, "negative_margin must be finite or None, got nan"),
        (-math.inf, ValueError, "negative_margin must be finite or None, got -inf"),
        ("0.1", TypeError, "negative_margin must be a number or None, got str"),
        (True, TypeError, "negative_margin must be a number or None, got bool"),
    ):
        for function in (fastclip.contrastive_loss, fastclip.contrastive_stats):
            with pytest.raises(error, match=words):
                function(x, x, negative_margin=value)
    with pytest.raises(ValueError, match="negative_margin leaves pairs out that label_smoothing"):
        fastclip.contrastive_loss(x, x, negative_margin=0.1, label_smoothing=0.1)


def test_the_cuda_backend_leaves_limits_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_Tiles", None)
    image, text = (x.to(DEVICE, torch.float16) for x in spread(70, 70, 24))
    limits = torch.full((70,), 0.5, device=DEVICE), torch.full((70,), -0.5, device=DEVICE)
    problem = Problem(image, text, torch.tensor(3.0, device=DEVICE), limits=limits)
    stats = cuda.contrastive_fwd(problem)
    for ours, theirs in zip(flat(stats), flat(reference.contrastive_fwd(problem))):
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-5, atol=1e-5)
    rows, cols = (SideGrads(*(torch.ones_like(x) for x in (side.neg, side.pos, side.pos_lse))) for side in stats)
    ours, theirs = (module.contrastive_bwd(problem, stats, (rows, cols), [True] * 3) for module in (cuda, reference))
    for a, b in zip(ours, theirs):
        assert a is not None and b is not None
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-2, atol=1e-2)
