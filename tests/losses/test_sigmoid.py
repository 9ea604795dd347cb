"""The sigmoid loss compared with open_clip and under torch's machinery; test_sigmoid_accuracy.py tests its accuracy."""

from __future__ import annotations

import itertools

import open_clip.loss
import pytest
import torch
from torch import Tensor

import fastclip
from fastclip.ops.sigmoid import Pairs
from support.accuracy import counted_products, leaves, pairs

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_sigmoid_reductions_agree() -> None:
    image, text = pairs(48, 48, 8)
    mean, total = (fastclip.sigmoid_loss(image, text, 10.0, -9.0, reduction=r) for r in ("mean", "sum"))
    torch.testing.assert_close(total, 48 * mean, rtol=1e-6, atol=0)


# Value and gradients of open_clip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [None, -10.0])
@pytest.mark.parametrize("output_dict", [False, True])
def test_siglip_loss_equals_open_clip(dtype: torch.dtype, bias: float | None, output_dict: bool) -> None:
    results = []
    for module in (fastclip.SigLipLoss(), open_clip.loss.SigLipLoss(cache_labels=True)):
        image, text = (torch.nn.functional.normalize(x.to(dtype), dim=1).requires_grad_() for x in pairs(50, 50, 16))
        scale = torch.tensor(10.0, requires_grad=True, dtype=dtype)
        logit_bias = None if bias is None else torch.tensor(bias, requires_grad=True, dtype=dtype)
        out = module(image, text, scale, logit_bias, output_dict=output_dict)
        loss = out["contrastive_loss"] if output_dict else out
        loss.backward()
        results.append([loss.detach(), image.grad, text.grad, scale.grad])
        results[-1] += [] if logit_bias is None else [logit_bias.grad]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


# Under torch's machinery


def problem(dtype: torch.dtype = torch.float32, N: int = 20) -> tuple[Tensor, ...]:
    return leaves(*(x.to(dtype) for x in pairs(N, N, 8)), 5.0, -4.0)


@pytest.mark.pairwise
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("needs", [(True,) * 4, (False, True, False, True), (False,) * 4], ids=str)
def test_sigmoid_op_passes_opcheck(backend: str | None, dtype: torch.dtype, needs: tuple[bool, ...]) -> None:
    if backend == "cpu" and dtype == torch.float64:
        backend = None  # the automatic choice serves float64 with the reference
    given = [x.detach().requires_grad_(need) for x, need in zip(problem(dtype), needs)]
    torch.library.opcheck(torch.ops.fastclip.sigmoid_fwd, Pairs(*given, 20, 0, True, backend, list(needs)))


@pytest.mark.parametrize("offset", [-3, 0, 5, 100])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_sigmoid_offset_moves_the_positives(offset: int, backend: str) -> None:
    image, text = pairs(20, 30, 8)
    given = leaves(image, text, 2.0, -1.0)
    out = torch.ops.fastclip.sigmoid_fwd(*Pairs(*given, 1, offset, False, backend, [True] * 4))
    i, t, s, b = (x.detach().double().requires_grad_() for x in given)
    sign = torch.where(torch.arange(20)[:, None] + offset == torch.arange(30), 1.0, -1.0)
    loss = -torch.nn.functional.logsigmoid(sign * (s * i @ t.T + b)).sum()
    expected = loss, *torch.autograd.grad(loss, (i, t, s, b))
    for ours, theirs in zip(out, expected):
        torch.testing.assert_close(ours.double(), theirs.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("needed", [n for k in range(1, 5) for n in itertools.combinations(range(4), k)], ids=str)
def test_sigmoid_every_subset_of_gradients(needed: tuple[int, ...]) -> None:
    given = problem()
    whole = torch.autograd.grad(fastclip.sigmoid_loss(*given), given)
    some = [x.detach().requires_grad_(k in needed) for k, x in enumerate(given)]
    found = torch.autograd.grad(fastclip.sigmoid_loss(*some), [some[k] for k in needed])
    for k, ours in zip(needed, found):
        assert torch.equal(ours, whole[k])


def test_sigmoid_work_is_three_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss takes 2 M N D operations, or 6 M N D with gradients, all of them in the forward pass."""
    operations = counted_products(monkeypatch)
    given = problem(N=40)
    loss = fastclip.sigmoid_loss(*given)
    assert sum(operations) == 6 * 40 * 40 * 8
    loss.backward()
    assert sum(operations) == 6 * 40 * 40 * 8
    for unwanted in (lambda: fastclip.sigmoid_loss(*(x.detach() for x in given)), lambda: no_grad_loss(given)):
        operations.clear()
        assert not unwanted().requires_grad
        assert sum(operations) == 2 * 40 * 40 * 8


def no_grad_loss(given: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        return fastclip.sigmoid_loss(*given)


@pytest.mark.parametrize("compiler", [pytest.param("inductor", marks=pytest.mark.full), "aot_eager"])
def test_sigmoid_compiles_whole(compiler: str) -> None:
    def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return fastclip.sigmoid_loss(2 * image, text, scale.exp(), bias)

    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    given = *problem()[:2], torch.tensor(1.5, requires_grad=True), torch.tensor(-4.0, requires_grad=True)
    expected, found = loss(*given), compiled(*given)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(torch.autograd.grad(found, given), torch.autograd.grad(expected, given)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_sigmoid_autocast_rounds_features_and_not_the_scalars(backend: str) -> None:
    image, text, *_ = problem()
    scale, bias = torch.tensor(14.2857, requires_grad=True), torch.tensor(-9.87654, requires_grad=True)
    rounded = [x.detach().bfloat16().requires_grad_() for x in (image, text)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fastclip.sigmoid_loss(image, text.bfloat16(), scale, bias, backend=backend)
    expected = fastclip.sigmoid_loss(*rounded, scale, bias, backend=backend)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    exact = fastclip.sigmoid_loss(*(x.double() for x in (*rounded, scale, bias)))
    assert abs(found.item() / exact.item() - 1) < 1e-5  # scalars in bfloat16 would be 1e-3 off
    ours = torch.autograd.grad(found, (image, scale, bias))
    theirs = torch.autograd.grad(expected, (rounded[0], scale, bias))
    assert ours[0].dtype == torch.float32
    for a, b in zip(ours, theirs):
        assert torch.equal(a, b.float())


def test_sigmoid_graph_can_be_used_twice() -> None:
    given = problem()
    loss = fastclip.sigmoid_loss(*given)
    first = torch.autograd.grad(loss, given, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, given)):
        assert torch.equal(a, b)


def test_sigmoid_reference_gradcheck_twice() -> None:
    for normalize, reduction in ((True, "mean"), (False, "sum")):
        given = problem(torch.float64, N=4)

        def loss(*leaves: Tensor, options=(normalize, reduction)) -> Tensor:
            return fastclip.sigmoid_loss(*leaves, normalize=options[0], reduction=options[1], backend="reference")

        assert torch.autograd.gradcheck(loss, given)
        assert torch.autograd.gradgradcheck(loss, given)


def test_sigmoid_second_derivatives_of_cpu_raise() -> None:
    image, text, scale, bias = problem()
    loss = fastclip.sigmoid_loss(image, text, scale, bias, backend="cpu")
    (gradient,) = torch.autograd.grad(loss, image, create_graph=True)
    with pytest.raises(RuntimeError, match=r"backend='cpu' has no second derivatives.*backend='reference'"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_sigmoid_runs_bitwise_repeatable(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = []
        for _ in range(20):
            given = leaves(*pairs(700, 700, 40), 10.0, -10.0)
            loss = fastclip.sigmoid_loss(*given)
            results.append([loss.detach(), *torch.autograd.grad(loss, given)])
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))
    finally:
        torch.set_num_threads(before)
