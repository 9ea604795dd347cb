"""The sigmoid loss of the GPU backends, called as the ops call it: shards, blocks, dtypes, launches.

What every backend shares is tested in losses/test_sigmoid_accuracy.py.
"""

from __future__ import annotations

import itertools
from types import ModuleType

import pytest
import torch
from torch import Tensor

import fastclip
from fastclip._backends import cuda, reference, triton
from fastclip._backends.problem import Problem
from fastclip.ops.sigmoid import Pairs
from support.accuracy import counted_products, pairs
from support.kernels import Launches
from support.kinds import GPU, GPU_KINDS, LAYOUTS, Kind, each_kind, fp16, kept, laid_out, uneven

MODULES: dict[str, ModuleType] = {"triton": triton, "cuda": cuda}
TRITON = [kind for kind in GPU_KINDS if kind.backend == "triton"]
ALL = (True,) * 4
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def problem(
    kind: Kind, M: int, N: int, D: int, *, scale: float = 10.0, offset: int = 0, normalize: bool = True
) -> Problem:
    image, text = (kept(x, kind.device) for x in kind.pairs(M, N, D))
    if not normalize:
        image, text = image / D**0.5, text / D**0.5
    return Problem(image, text, torch.tensor(scale, device=kind.device), None, offset, False, normalize)


def bias_of(kind: Kind, bias: float = -10.0) -> Tensor:
    return torch.tensor(bias, device=kind.device)


def run(
    kind: Kind,
    p: Problem,
    bias: Tensor,
    *,
    divisor: int = 1,
    needs: tuple[bool, ...] = ALL,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor | None]:
    """Return the loss and gradients of one backend's forward pass."""
    return list(MODULES[kind.backend].sigmoid_fwd(p, bias, divisor, list(needs), dtype))


def true_of(p: Problem, bias: Tensor, divisor: int = 1) -> list[Tensor]:
    wide = (x.double().cpu() for x in p[:3])
    p = p._replace(**dict(zip(("image", "text", "scale"), wide)))
    return list(reference.sigmoid_fwd(p, bias.double().cpu(), divisor, [True] * 4, torch.float64))


def assert_close(kind: Kind, found: list[Tensor | None], true: list[Tensor]) -> None:
    for name, ours, expected in zip(("loss", "d_image", "d_text", "d_scale", "d_bias"), found, true):
        assert ours is not None
        error, size = (ours.double().cpu() - expected).norm(), expected.norm()
        small = 1e-5 if kind.dtype == torch.float32 else 1e-3 if kind.dtype == torch.float16 else 8e-3
        assert error <= (small if ours.dim() else 1e-4) * size + 1e-30, (name, float(error), float(size))
    assert abs(float(found[0]) / float(true[0]) - 1) < 1e-5


@pytest.mark.pairwise
@pytest.mark.parametrize("offset", [0, 5, -3, 60, 1000, -1000])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("megabytes", ["", "0.04"])
@pytest.mark.parametrize("shape", [(50, 190, 24), (150, 60, 24), (1, 9, 8), (9, 1, 6)], ids=str)
@each_kind(GPU_KINDS)
def test_shards_and_blocks(
    kind: Kind,
    shape: tuple[int, int, int],
    megabytes: str,
    normalize: bool,
    offset: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """M images and N texts, whose diagonal begins at `offset` or lies outside, give the same results
    whole and in blocks of weights.
    """
    if megabytes:
        monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", megabytes)
    p, bias = problem(kind, *shape, scale=5.0, offset=offset, normalize=normalize), bias_of(kind, -3.0)
    assert_close(kind, run(kind, p, bias, divisor=7), true_of(p, bias, 7))


@pytest.mark.parametrize("shape", [(20, 30, 3), (140, 140, 0)], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@each_kind(GPU_KINDS, few=True)
def test_every_subset_of_gradients(kind: Kind, normalize: bool, shape: tuple[int, int, int]) -> None:
    M, N, offset = shape
    p, bias = problem(kind, M, N, 16, offset=offset, normalize=normalize), bias_of(kind)
    whole = run(kind, p, bias)
    for needs in itertools.product((False, True), repeat=4):
        loss, *some = run(kind, p, bias, needs=needs)
        # without gradients the tiles differ
        torch.testing.assert_close(loss, whole[0], rtol=0 if any(needs) else 1e-6, atol=0)
        for need, ours, all_of_them in zip(needs, some, whole[1:]):
            assert (ours is not None) == need
            assert ours is None or torch.equal(ours, all_of_them)
        upstream = torch.tensor(3.0, device=kind.device)
        products = MODULES[kind.backend].sigmoid_bwd((*p[:3], bias), some, upstream)
        for x, ours, product in zip((*p[:3], bias), some, products):
            assert (product is None) == (ours is None)
            if product is not None:
                assert product.dtype == x.dtype and product.shape == x.shape and product.is_contiguous()
                assert torch.equal(product, (ours.float() * 3.0).to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_kind(GPU_KINDS)
def test_loss_of_the_dtype_that_is_asked_for(kind: Kind, dtype: torch.dtype) -> None:
    """The loss is computed in the requested dtype, not rounded to float32 on the way, and the gradients of features are
    kept in a dtype that holds them.
    """
    p, bias = problem(kind, 140, 140, 16), bias_of(kind)
    for needs in (ALL, (False,) * 4):
        loss, d_image, _, d_scale, _ = run(kind, p, bias, divisor=3, needs=needs, dtype=dtype)
        assert loss.dtype == dtype and loss.shape == ()
        if dtype == torch.float64:
            assert loss != loss.float()
        if d_image is not None:
            assert d_image.dtype == reference.saved_dtype(p.image) and d_scale.dtype == torch.float32


@pytest.mark.parametrize("normalize", [True, False])
@each_kind(fp16(GPU_KINDS))
def test_float16_weights_of_a_solved_batch_keep_digits(kind: Kind, normalize: bool) -> None:
    """The float16 weights of a solved batch keep their digits. They would flush to 0 without a gain, which a separate
    launch computes for features that are not normalised.
    """
    image, text = (x / x.float().norm(dim=1, keepdim=True) for x in pairs(60, 60, 64, aligned=0.0))
    image, text = (kept(x.to(kind.dtype), kind.device) for x in (image, text))
    p = Problem(image, text, torch.tensor(20.0, device=kind.device), None, 1000, False, normalize)
    bias = bias_of(kind, -50.0)  # weights near 1e-22
    assert_close(kind, run(kind, p, bias), true_of(p, bias))


@each_kind(GPU_KINDS)
def test_one_pair(kind: Kind) -> None:
    p, bias = problem(kind, 1, 1, 8, scale=2.0, normalize=False), bias_of(kind, 1.0)
    assert_close(kind, run(kind, p, bias), true_of(p, bias))


@each_kind(GPU_KINDS, few=True)
def test_zero_rows(kind: Kind) -> None:
    p, bias = problem(kind, 40, 40, 16), bias_of(kind)
    p.image[3], p.text[5] = 0, 0
    found, true = run(kind, p, bias), true_of(p, bias)
    assert abs(float(found[0]) / float(true[0]) - 1) < 1e-5
    others = [torch.arange(40) != k for k in (3, 5)]
    for ours, expected, some in zip(found[1:3], true[1:3], others):
        assert ours.isfinite().all()
        assert (ours.double().cpu() - expected)[some].norm() <= 1e-2 * expected[some].norm()
    assert found[3].isfinite() and found[4].isfinite()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("spoiled", ["scale", "bias"])
@each_kind(GPU_KINDS, few=True)
def test_scalars_that_are_not_finite_propagate(kind: Kind, spoiled: str, value: float) -> None:
    p = problem(kind, 140, 140, 16, scale=value if spoiled == "scale" else 10.0)
    found = run(kind, p, bias_of(kind, value if spoiled == "bias" else -10.0))
    assert not found[0].isfinite()
    assert value == torch.inf or all(x.isnan().all() for x in found)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("place", [0, 129])
@pytest.mark.parametrize("side", [0, 1])
@each_kind(GPU_KINDS, few=True)
def test_nan_propagates(kind: Kind, side: int, place: int, normalize: bool) -> None:
    p, bias = problem(kind, 130, 130, 8, normalize=normalize), bias_of(kind)
    p[side][place, 2] = torch.nan
    for needs in (ALL, (False,) * 4):
        loss, *grads = run(kind, p, bias, needs=needs)
        assert loss.isnan()
        assert all(d is None or d.isnan().any() for d in grads)


@pytest.mark.pairwise
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("D", [2, 24, 30])
@pytest.mark.parametrize("side", ["image", "text"])
@pytest.mark.parametrize("normalize", [True, False])
@each_kind(GPU_KINDS, few=True)
def test_layouts(kind: Kind, normalize: bool, side: str, D: int, layout: str) -> None:
    p, bias = problem(kind, 40, 40, D, normalize=normalize, scale=5.0), bias_of(kind, -3.0)
    p = p._replace(**{side: laid_out(getattr(p, side), layout)})
    found = run(kind, p, bias)
    assert_close(kind, found, true_of(p, bias))
    assert found[1].is_contiguous() and found[2].is_contiguous()


@each_kind(GPU_KINDS)
def test_bitwise_repeatable(kind: Kind) -> None:
    p, bias = problem(kind, 140, 150, 40, offset=-4), bias_of(kind)
    first = run(kind, p, bias)
    for _ in range(250 if GPU else 2):
        assert all(torch.equal(a, b) for a, b in zip(first, run(kind, p, bias)))


@pytest.mark.parametrize("wide", [False, True])
@each_kind(GPU_KINDS)
def test_upstream_gradient_multiplies(kind: Kind, wide: bool) -> None:
    """The kept gradients are multiplied by any upstream gradient (0, a loss scaler's factor, NaN) and rounded once at
    the end, as often as backward is called.
    """
    p, bias = problem(kind, 30, 70, 16, offset=20), bias_of(kind)
    inputs = *p[:3], bias
    _, *grads = run(kind, p, bias, divisor=30)
    for factor in (0.0, 65536.0, 1e-3, torch.nan, torch.inf, 0.0):
        upstream = torch.tensor(factor, device=kind.device, dtype=torch.float64 if wide else torch.float32)
        for x, d, product in zip(inputs, grads, MODULES[kind.backend].sigmoid_bwd(inputs, grads, upstream)):
            expected = (d.float() * upstream.float()).to(x.dtype)
            torch.testing.assert_close(product, expected, rtol=0, atol=0, equal_nan=True)


@each_kind(GPU_KINDS, few=True)
def test_gradients_lie_apart_and_follow_any_upstream(kind: Kind) -> None:
    """Each gradient has its own memory, because users change .grad in place."""
    image, text = (x.detach().requires_grad_() for x in problem(kind, 20, 20, 8)[:2])
    scalars = [torch.tensor(x, device=kind.device, requires_grad=True) for x in (10.0, -10.0)]
    inputs = image, text, *scalars
    loss = fastclip.sigmoid_loss(*inputs, backend=kind.backend)
    one = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert len({x.untyped_storage().data_ptr() for x in one}) == 4
    negated = torch.tensor(-3.0j, device=kind.device).conj().imag  # 3, stored as -3 with torch's negation bit
    assert negated.is_neg()
    thrice = torch.autograd.grad(loss, inputs, negated, retain_graph=True)
    factors = torch.tensor([2.0, -3.0], device=kind.device)
    batches = torch.autograd.grad(loss, inputs, factors, is_grads_batched=True)
    for x, y, batch in zip(one, thrice, batches):
        torch.testing.assert_close(y, 3 * x, rtol=1e-2, atol=1e-6)
        torch.testing.assert_close(batch, torch.stack([2 * x, -3 * x]), rtol=1e-2, atol=1e-6)


@each_kind(GPU_KINDS, few=True)
def test_kept_gradients_anywhere_in_memory(kind: Kind) -> None:
    """Gradients that a user's hook returns need not be aligned, and the products write no further than the
    gradients.
    """
    p, bias = problem(kind, 131, 67, 24), bias_of(kind)
    _, *grads = run(kind, p, bias)
    inputs, upstream = (*p[:3], bias), torch.tensor(2.0, device=kind.device)
    moved = [torch.cat([d.new_zeros(1), d.flatten()])[1:].view(d.shape) for d in grads]
    for a, b in zip(*(MODULES[kind.backend].sigmoid_bwd(inputs, given, upstream) for given in (grads, moved))):
        assert torch.equal(a, b)


@pytest.mark.parametrize("normalize", [True, False])
@each_kind(TRITON)
def test_work_and_launches(kind: Kind, normalize: bool, monkeypatch: pytest.MonkeyPatch, launches: Launches) -> None:
    """The forward pass takes three launches and two products, the backward pass one launch. A fourth launch computes
    the bound behind float16's gain, or copies. Without gradients the launches are the same, without products.
    """
    operations = counted_products(monkeypatch)
    p, bias = problem(kind, 256, 200, 64, normalize=normalize), bias_of(kind)
    more = []
    if normalize and kind.dtype != torch.bfloat16:
        more = ["copy_sides_kernel"]
    elif kind.dtype == torch.float16:
        more = ["sigmoid_bound_kernel"]
    forward = ["sigmoid_norms_kernel", *more, "sigmoid_fwd_kernel", "sigmoid_finish_kernel"]
    loss, *grads = run(kind, p, bias)
    assert launches.names == forward and operations == [2 * 256 * 200 * 64] * 2
    triton.sigmoid_bwd((*p[:3], bias), grads, loss.float())
    assert launches.names[len(forward) :] == ["sigmoid_bwd_kernel"]
    operations.clear()
    run(kind, p, bias, needs=(False,) * 4)
    assert launches.names[len(forward) + 1 :] == forward and operations == []


@each_kind(TRITON, few=True)
def test_workspace_bounded(kind: Kind, monkeypatch: pytest.MonkeyPatch, launches: Launches) -> None:
    """Weights stay within the workspace for any batch; other memory is as large as the features."""
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", "0.125")
    p, bias = problem(kind, 700, 600, 8), bias_of(kind)
    assert_close(kind, run(kind, p, bias), true_of(p, bias))
    sizes = [max(x.untyped_storage().nbytes() for x in found) for found in launches.tensors("sigmoid_fwd_kernel")]
    assert len(sizes) > 1 and max(sizes) <= 2**17 + 2 * 1300 * (4 * 8 + 4 * 4)


@pytest.mark.parametrize("needs", [ALL, (False, True, False, True), (False,) * 4], ids=str)
@each_kind(GPU_KINDS, few=True)
def test_op_passes_opcheck(kind: Kind, needs: tuple[bool, ...]) -> None:
    p, bias = problem(kind, 20, 20, 8), bias_of(kind)
    given = [x.detach().requires_grad_(need) for x, need in zip((*p[:3], bias), needs)]
    torch.library.opcheck(torch.ops.fastclip.sigmoid_fwd, Pairs(*given, 20, 0, True, kind.backend, list(needs)))


@each_kind(GPU_KINDS, few=True)
def test_uneven_norms(kind: Kind) -> None:
    """Uneven norms give logits on both sides of 0 that overflow an exponential; loss and gradients stay accurate."""
    image, text = (kept(x.to(kind.dtype), kind.device) for x in uneven(90, 90))
    p = Problem(image, text, torch.tensor(0.5, device=kind.device), None, 0, False, False)
    assert_close(kind, run(kind, p, bias_of(kind, -4.0)), true_of(p, bias_of(kind, -4.0)))
