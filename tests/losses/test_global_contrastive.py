"""GlobalContrastiveLoss against the dense formulas of SogCLR and FastCLIP in fp64."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastclip
from fastclip.losses.global_contrastive import _mean_of_repeats as mean_of_repeats
from fastclip.parity.promised import FP32_GRADIENT, FP64, LOSS, SCALE_GRADIENT
from support.accuracy import pairs
from support.global_loss import DenseGlobalLoss

N, D, SAMPLES = 12, 16, 30
OPTIONS: dict[str, dict[str, Any]] = {
    "SogCLR": {"eps": 0.0},
    "eps": {"eps": 0.3},
    "FastCLIP-v3": {"rho": 6.5, "eps": 1e-14},
    "with the factor tau": {"rho": 0.0, "eps": 0.0},
}


def steps(dtype: torch.dtype, repeats: bool = False) -> list[tuple[Tensor, Tensor, Tensor, Tensor, float]]:
    """Return image and text features, scale, index and gamma of a few steps in which samples return."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for k in range(6):
        image, text = (x.to(dtype).requires_grad_() for x in pairs(N, N, D, noise=1.0, seed=k))
        scale = torch.tensor(4.0 + k, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
        index = torch.randperm(SAMPLES, generator=generator)[:N]
        if repeats:
            index = index[torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 0, 8])]
        found.append((image, text, scale, index, (0.9, 0.5, 0.2)[k % 3]))
    return found


def value_and_gradients(loss: Any, *given: Tensor) -> list[Tensor]:
    leaves = [x for x in given if x.requires_grad]
    value = loss(*given)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def error(ours: Tensor, true: Tensor) -> float:
    return float((ours.double() - true).norm() / true.norm())


@pytest.mark.parametrize("repeats", [False, True], ids=["once", "repeats"])
@pytest.mark.parametrize("backend", ["float64", "reference", "cpu"])
@pytest.mark.parametrize("name", OPTIONS)
def test_steps_are_those_of_the_papers(name: str, backend: str, repeats: bool) -> None:
    """Value, gradients and running means of several steps are those of the papers' formulas, with gammas that change,
    first visits, returns, and samples that occur twice in a batch.
    """
    exact = backend == "float64"
    dtype = torch.float64 if exact else torch.float32
    ours = fastclip.GlobalContrastiveLoss(SAMPLES, backend=None if exact else backend, **OPTIONS[name])
    ours = ours.double() if exact else ours
    dense = DenseGlobalLoss(SAMPLES, 1.0, **OPTIONS[name])
    for *given, gamma in steps(dtype, repeats):
        ours.gamma = dense.gamma = gamma
        true = value_and_gradients(dense, *(x.detach().double().requires_grad_() for x in given[:3]), given[3])
        found = value_and_gradients(ours, *given)
        assert found[0].dtype == dtype
        promised = (LOSS, FP32_GRADIENT, FP32_GRADIENT, SCALE_GRADIENT)
        for x, y, budget in zip(found, true, promised, strict=True):
            assert error(x, y) <= (FP64 if exact else budget)
        for log_u, u in zip((ours.log_u_image, ours.log_u_text), dense.u):
            seen = ~u.isnan()
            assert torch.equal(seen, log_u > -torch.inf) and seen.any()
            torch.testing.assert_close(log_u[seen].double(), u[seen].log(), rtol=0, atol=1e-13 if exact else 1e-5)
    assert not seen.all(), "the case has no sample that was never seen"


@pytest.mark.parametrize("gamma", [1.0, 0.3])
def test_gradient_is_that_of_the_dataset_s_loss(gamma: float) -> None:
    """If a batch holds the dataset and gamma is 1, value and gradient are those of the decoupled loss of the dataset. A
    smaller gamma keeps a share of the features of earlier visits, so that the gradient is another one.
    """
    image, text = (x.double().requires_grad_() for x in pairs(N, N, D, noise=1.0))
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    loss = fastclip.GlobalContrastiveLoss(N, gamma, eps=0.0).double()
    index = torch.randperm(N)
    loss(text, image.flip(0), scale, index.flip(0))  # an earlier visit with other features

    z = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    others = z.masked_fill(torch.eye(N, dtype=torch.bool), -torch.inf)
    whole = ((others.logsumexp(1) + others.logsumexp(0)) / 2 - z.diagonal()).mean() - math.log(N - 1)
    true = [whole.detach(), *torch.autograd.grad(whole, (image, text, scale))]
    errors = [error(x, y) for x, y in zip(value_and_gradients(loss, image, text, scale, index), true)]
    assert max(errors) < FP64 if gamma == 1 else min(errors) > 1e-3


@pytest.mark.parametrize("direction", [-1.0, 1.0], ids=["g is e^200", "g is e^-200"])
def test_estimators_do_not_overflow(direction: float) -> None:
    """State, loss and gradients keep their digits at scale 100, where g reaches exp(200) and exp(-200)."""
    generator = torch.Generator().manual_seed(0)
    axis = F.normalize(torch.randn(D, generator=generator), dim=0)
    side = torch.tensor([1.0, -1.0]).repeat(N // 2)[:, None]
    image, text = (
        (factor * side * axis + 0.01 * torch.randn(N, D, generator=generator)).requires_grad_()
        for factor in (1.0, direction)
    )
    index = torch.arange(N)
    if direction > 0:  # of two pairs, each has one negative, in the opposite direction
        image, text, index = image.detach()[:2].requires_grad_(), text.detach()[:2].requires_grad_(), index[:2]
    ours, true = (fastclip.GlobalContrastiveLoss(N, 0.5, eps=0.0).to(d) for d in (torch.float32, torch.float64))
    for _ in range(2):
        found = value_and_gradients(ours, image, text, torch.tensor(100.0, requires_grad=True), index)
        exact = (x.detach().double().requires_grad_() for x in (image, text, torch.tensor(100.0)))
        expected = value_and_gradients(true, *exact, index)
        assert abs(float(found[0])) > 150
        assert all(error(x, y) < 1e-4 for x, y in zip(found, expected))
        assert ours.log_u_image[index].abs().min() > 150 and ours.log_u_text[index].isfinite().all()


@pytest.mark.parametrize("how", ["eval", "no_grad", "inference_mode"])
def test_validation_reads_the_state_only(how: str) -> None:
    """Neither eval mode nor a call without gradients changes the state, whichever mode the module is in."""
    loss = fastclip.GlobalContrastiveLoss(SAMPLES, 0.5)
    given = steps(torch.float32)
    loss(*given[0][:4])
    before = {name: x.clone() for name, x in loss.state_dict().items()}
    loss.train(how != "eval")
    with nullcontext() if how == "eval" else getattr(torch, how)():
        seen = loss(*given[1][:3], given[0][3])
        unseen = loss(*given[1][:3], (~torch.isin(torch.arange(SAMPLES), given[0][3])).nonzero()[:N, 0])
    assert all(torch.equal(x, before[name]) for name, x in loss.state_dict().items())
    # The value is that of the running means, and of the batch for samples that have none
    stored = before["log_u_image"][given[0][3]].mean() + before["log_u_text"][given[0][3]].mean()
    torch.testing.assert_close(seen, stored / 2)
    fresh = fastclip.GlobalContrastiveLoss(SAMPLES, 0.5)
    assert torch.equal(unseen, fresh(*given[1][:4]))


def test_restored_state_continues_bit_for_bit() -> None:
    given = steps(torch.float32)
    whole, first, second = (fastclip.GlobalContrastiveLoss(SAMPLES, 0.5) for _ in range(3))
    values = [whole(*x[:4]) for x in given]
    again = [first(*x[:4]) for x in given[:3]]
    assert first.state_dict().keys() == {"log_u_image", "log_u_text"}
    second.load_state_dict(first.state_dict())
    again += [second(*x[:4]) for x in given[3:]]
    assert all(torch.equal(x, y) for x, y in zip(values, again, strict=True))
    with pytest.raises(RuntimeError, match="size mismatch"):
        fastclip.GlobalContrastiveLoss(SAMPLES + 1).load_state_dict(first.state_dict())


def test_step_that_overflows_leaves_the_state() -> None:
    image, text, scale, index, _ = steps(torch.float32)[0]
    loss = fastclip.GlobalContrastiveLoss(SAMPLES)
    loss(image, text, scale, index)
    before = loss.log_u_image.clone()
    broken = image.detach().clone()
    broken[0] = torch.inf
    assert not loss(broken, text, scale, index).isfinite()
    assert torch.equal(loss.log_u_image[index[0]], before[index[0]]) and not loss.log_u_image.isnan().any()
    assert not loss.log_u_text.isnan().any()


@pytest.mark.parametrize("rho", [None, 6.5])
def test_batch_of_one_sample_has_no_gradient(rho: float | None) -> None:
    """Without negatives nothing has a gradient, not even the temperature through rho, seen before or not."""
    image, text, scale, index, _ = steps(torch.float32)[0]
    loss = fastclip.GlobalContrastiveLoss(SAMPLES, rho=rho, eps=0.0)
    for seen in (False, True):
        if seen:
            loss(image, text, scale, index)
        before = loss.log_u_image.clone()
        value, *gradients = value_and_gradients(loss, image, text, scale, torch.full((N,), int(index[0])))
        assert value == 0 and not any(x.any() for x in gradients) and torch.equal(loss.log_u_image, before)


def test_means_of_repeats_depend_on_no_order() -> None:
    """A permuted batch, whose sums a GPU may add in any order, gives the same means, bit for bit."""
    index = torch.tensor([4, 4, 7, 4, 1, 4, 4, 7, 4, 7, 4, 4] * 4)
    for dtype in (torch.float32, torch.float64):
        log_g = 3 * torch.randn(48, 2, dtype=dtype, generator=torch.Generator().manual_seed(0))
        log_g[4::12] = log_g[4]
        means = mean_of_repeats(index, log_g)
        for k in (4, 7):
            of_sample = log_g[index == k]
            expected = (of_sample.logsumexp(0) - math.log(len(of_sample))).expand_as(of_sample)
            torch.testing.assert_close(means[index == k], expected)
        for seed in range(20):
            order = torch.randperm(48, generator=torch.Generator().manual_seed(seed))
            assert torch.equal(mean_of_repeats(index[order], log_g[order]), means[order])
    once = torch.arange(48)
    assert torch.equal(mean_of_repeats(once, log_g), log_g)


def test_module_compiles_and_gammas_change() -> None:
    eager, other = (fastclip.GlobalContrastiveLoss(SAMPLES) for _ in range(2))
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for *given, gamma in steps(torch.float32):
        eager.gamma = other.gamma = gamma
        torch.testing.assert_close(compiled(*given), eager(*given))
    torch.testing.assert_close(other.log_u_text, eager.log_u_text)


def test_errors_name_the_argument() -> None:
    image, text, scale, index, _ = steps(torch.float32)[0]
    loss = fastclip.GlobalContrastiveLoss(SAMPLES)

    def refused(kind: type[Exception], message: str, *given: Any, of: Any = loss) -> None:
        with pytest.raises(kind, match=message):
            of(*given)
        assert (loss.log_u_image == -torch.inf).all()

    refused(ValueError, "index must be from 0 to 29.*got 30", image, text, scale, torch.arange(N) + 30)
    refused(ValueError, "index must be from 0 to 29.*got -1", image, text, scale, torch.arange(-1, N - 1))
    refused(TypeError, "index must be int64 or int32.*float32", image, text, scale, index.float())
    refused(TypeError, "index must be a torch.Tensor.*list", image, text, scale, index.tolist())
    refused(ValueError, r"index must hold the sample of every pair.*\(11,\)", image, text, scale, index[1:])
    refused(ValueError, r"index must hold.*text_features \(11, 16\)", image, text[1:], scale, index)
    refused(ValueError, r"index must hold.*\(12, 1\)", image, text, scale, index[:, None])
    refused(ValueError, "at least two pairs", image[:1], text[:1], scale, index[:1])
    refused(TypeError, "state of the loss must be float32 or float64", image, text, scale, index, of=moved(torch.half))
    refused(ValueError, r"features' device.*\.to\('cpu'\)", image, text, scale, index, of=moved("meta"))
    loss.gamma = 0.0
    refused(ValueError, "gamma must be above 0 and at most 1, got 0", image, text, scale, index)
    for options, message in (
        ({"samples": 1}, "samples must be at least 2"),
        ({"gamma": 1.5}, "gamma must be above 0"),
        ({"eps": -1.0}, "eps must be finite and at least 0"),
        ({"rho": math.inf}, "rho must be finite"),
        ({"comm": "tree"}, "comm must be"),
    ):
        with pytest.raises(ValueError, match=message):
            fastclip.GlobalContrastiveLoss(**{"samples": SAMPLES, **options})
    with pytest.raises(TypeError, match="without a known length"):
        fastclip.GlobalContrastiveLoss(None)  # type: ignore[arg-type]


def moved(to: Any) -> fastclip.GlobalContrastiveLoss:
    return fastclip.GlobalContrastiveLoss(SAMPLES).to(to)
