"""The ops under torch's machinery: opcheck, compile, autocast, autograd, layouts, memory."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastclip
from fastclip.ops.contrastive import by_side
from support import ROOT
from support.accuracy import PEAK_MIB, check, pairs

BACKENDS = ["cpu", "reference"]


def problem(dtype: torch.dtype = torch.float32, N: int = 20, D: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    image, text = (x.to(dtype).clone().requires_grad_() for x in pairs(N, N, D))
    scale_dtype = torch.promote_types(dtype, torch.float32)
    return image, text, torch.tensor(5.0, dtype=scale_dtype, requires_grad=True)


def label_options(N: int = 20, classes: int = 7) -> dict[str, Tensor]:
    return {"image_labels": torch.arange(N) % classes, "text_labels": torch.arange(N) * 3 % classes}


@pytest.mark.pairwise
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_ops_pass_opcheck(backend: str, labels: bool, dtype: torch.dtype) -> None:
    if backend == "cpu" and dtype == torch.float64:
        backend = None  # the automatic choice serves float64 with the reference
    given = problem(dtype)
    y = (torch.arange(20, dtype=torch.int32) % 7, torch.arange(20, dtype=torch.int32) % 5) if labels else (None, None)
    options = (0, False, True, backend, None, None)
    torch.library.opcheck(torch.ops.fastclip.contrastive_fwd, (*given, *y, *options))
    detached = tuple(x.detach() for x in given)
    stats = torch.ops.fastclip.contrastive_fwd(*detached, *y, *options)
    grads = [torch.rand_like(x) for x in stats[:6]]
    for needs in ([True, True, True], [False, True, False]):
        torch.library.opcheck(torch.ops.fastclip.contrastive_bwd, (*detached, *y, *options, list(stats), grads, needs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ops_of_pairs_pass_opcheck(backend: str, dtype: torch.dtype) -> None:
    given = problem(dtype)
    options = (0.3, True, backend)
    torch.library.opcheck(torch.ops.fastclip.plain_fwd, (*given, *options))
    detached = tuple(x.detach() for x in given)
    _, saved = torch.ops.fastclip.plain_fwd(*detached, *options)
    for needs in ([True, True, True], [False, True, False]):
        torch.library.opcheck(torch.ops.fastclip.plain_bwd, (*detached, saved, *options, torch.tensor(2.0), needs))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_op_of_pairs_is_the_loss(backend: str, dtype: torch.dtype, normalize: bool) -> None:
    """The op that torch.compile records gives the bits of the eager call, or its result to rounding with the reference
    backend.
    """
    given = problem(dtype)
    loss = fastclip.contrastive_loss(*given, normalize=normalize, image_weight=0.3, backend=backend)
    recorded, _ = torch.ops.fastclip.plain_fwd(*given, 0.3, normalize, backend)
    exact = {"rtol": 0, "atol": 0} if backend == "cpu" else {}
    for a, b in zip(
        (loss, *torch.autograd.grad(3 * loss, given)), (recorded, *torch.autograd.grad(3 * recorded, given))
    ):
        torch.testing.assert_close(a, b, **exact)


def test_gradients_of_many_upstream_gradients_at_once() -> None:
    """torch.func.vmap maps the backward pass of a graph that any backend has recorded."""
    given = problem()
    upstream = torch.tensor([1.0, -2.0, 0.0])
    for loss in (fastclip.contrastive_loss(*given), fastclip.sigmoid_loss(*given, -3.0)):
        one = torch.autograd.grad(loss, given, retain_graph=True)
        many = torch.func.vmap(lambda k, loss=loss: torch.autograd.grad(loss, given, k, retain_graph=True))(upstream)
        for a, b in zip(many, one):
            torch.testing.assert_close(a, torch.stack([k * b for k in upstream]))


@pytest.mark.parametrize("offset", [-3, 0, 5, 100])
@pytest.mark.parametrize("backend", BACKENDS)
def test_offset_moves_the_positives(offset: int, backend: str) -> None:
    image, text = pairs(20, 30, 8)
    ones = torch.tensor(2.0)
    out = torch.ops.fastclip.contrastive_fwd(image, text, ones, None, None, offset, False, False, backend, None, None)
    rows, cols = by_side(out)
    z = 2.0 * (image.double() @ text.double().T)
    positive = torch.arange(20)[:, None] + offset == torch.arange(30)
    negative = z.masked_fill(positive, -torch.inf)
    expected = (negative.logsumexp(1), negative.logsumexp(0), (z * positive).sum(1), (z * positive).sum(0))
    for ours, theirs in zip((rows.neg, cols.neg, rows.pos, cols.pos), expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_sets_are_minus_infinity(backend: str) -> None:
    image, text = pairs(3, 2, 4)
    y = torch.tensor([7, 7, 1], dtype=torch.int32), torch.tensor([7, 7], dtype=torch.int32)
    out = torch.ops.fastclip.contrastive_fwd(image, text, torch.tensor(2.0), *y, 0, False, True, backend, None, None)
    rows, cols = by_side(out)
    assert (rows.neg == -torch.inf).tolist() == [True, True, False]  # the first two rows have no negatives
    assert (rows.pos_lse == -torch.inf).tolist() == [False, False, True]
    assert rows.pos[2] == 0
    assert cols.neg.isfinite().all() and cols.pos_lse.isfinite().all()


CASES = {"diagonal": {}, "labels": label_options(), "smoothing": {"label_smoothing": 0.1}, "sum": {"reduction": "sum"}}


@pytest.mark.parametrize(("compiler", "name"), [("inductor", "labels"), *(("aot_eager", name) for name in CASES)])
def test_compiles_whole(name: str, compiler: str) -> None:

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return fastclip.contrastive_loss(2 * image, text, scale.exp(), **CASES[name])

    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    image, text, _ = problem()
    given = image, text, torch.tensor(1.5, requires_grad=True)
    expected, found = loss(*given), compiled(*given)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(torch.autograd.grad(found, given), torch.autograd.grad(expected, given)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_compiles_with_changing_batch() -> None:
    compiled = torch.compile(fastclip.contrastive_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for N in (8, 13, 70):
        image, text, scale = problem(N=N)
        found = torch.autograd.grad(compiled(image, text, scale), image)
        assert torch.equal(*found, *torch.autograd.grad(fastclip.contrastive_loss(image, text, scale), image))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_rounds_features_and_not_the_scale(options: dict[str, float], backend: str) -> None:
    options = {**options, "backend": backend}
    image, text, _ = problem()
    scale = torch.tensor(14.2857, requires_grad=True)
    rounded = image.detach().bfloat16().requires_grad_(), text.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fastclip.contrastive_loss(image, text.bfloat16(), scale, **options)
        alone = fastclip.contrastive_loss(image, text, scale, **options)
    expected = fastclip.contrastive_loss(*rounded, scale, **options)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected) and torch.equal(alone, expected)
    exact = fastclip.contrastive_loss(*(x.double() for x in rounded), scale.double(), **{**options, "backend": None})
    assert abs(found.item() / exact.item() - 1) < 1e-5  # a scale in bfloat16 would be 1e-3 off
    ours = torch.autograd.grad(found, (image, scale))
    theirs = torch.autograd.grad(expected, (rounded[0], scale))
    assert ours[0].dtype == torch.float32
    assert torch.equal(ours[0], theirs[0].float()) and torch.equal(ours[1], theirs[1])


def test_autocast_leaves_float64_alone() -> None:
    image, text, scale = problem(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fastclip.contrastive_loss(image, text, scale), fastclip.contrastive_loss(image, text, scale))
        assert fastclip.contrastive_loss(image, text, scale).dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needed", [n for k in (1, 2, 3) for n in itertools.combinations(range(3), k)], ids=str)
def test_every_subset_of_gradients(needed: tuple[int, ...], backend: str) -> None:
    given = problem()
    whole = torch.autograd.grad(fastclip.contrastive_loss(*given, backend=backend), given)
    some = [x.detach().requires_grad_(k in needed) for k, x in enumerate(given)]
    found = torch.autograd.grad(fastclip.contrastive_loss(*some, backend=backend), [some[k] for k in needed])
    for k, ours in zip(needed, found):
        assert torch.equal(ours, whole[k])


def test_no_gradient_wanted() -> None:
    image, text, scale = (x.detach() for x in problem())
    assert not fastclip.contrastive_loss(image, text, scale).requires_grad
    with torch.no_grad():
        assert not fastclip.contrastive_loss(*problem()).requires_grad


LAYOUTS = {
    "transposed": lambda x: x.T.contiguous().T,
    "every second row": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "every second column": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
    "flipped": lambda x: x.flip(0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_accurate(layout: str, dtype: torch.dtype) -> None:
    image, text = pairs(70, 70, 24)
    image, text = LAYOUTS[layout](image.to(dtype)), LAYOUTS[layout](text.to(dtype).flip(1))

    def loss(image_leaf: Tensor, text_leaf: Tensor, scale: Tensor) -> Tensor:
        return fastclip.contrastive_loss(
            image_leaf.as_strided(image.shape, image_leaf.stride()), LAYOUTS["transposed"](text_leaf), scale
        )

    check(loss, image, text, 14.3)


def test_reference_gradcheck_twice() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)

    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    y = {"image_labels": torch.tensor([0, 1, 1, 5]), "text_labels": torch.tensor([1, 0, 1, 8, 1])}
    everyone = {"image_labels": torch.zeros(4, dtype=torch.int64), "text_labels": torch.zeros(5, dtype=torch.int64)}
    for N, options in (
        (4, {}),
        (4, {"normalize": False, "image_weight": 0.75, "label_smoothing": 0.1}),
        (4, {"reduction": "sum"}),
        (4, {"reduction": "none"}),
        (5, y),
        (5, {**y, "label_smoothing": 0.3, "normalize": False}),
        (5, everyone),
    ):
        given = random(4, 3), random(N, 3), scale

        def loss(*leaves: Tensor, options: dict[str, object] = options) -> Tensor:
            return fastclip.contrastive_loss(*leaves, backend="reference", **options)

        assert torch.autograd.gradcheck(loss, given)
        assert torch.autograd.gradgradcheck(loss, given)


def test_second_derivatives_of_cpu_raise() -> None:
    image, text, scale = problem()
    (gradient,) = torch.autograd.grad(
        fastclip.contrastive_loss(image, text, scale, backend="cpu"), image, create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"backend='cpu' has no second derivatives.*backend='reference'"):
        gradient.square().sum().backward()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(("dtype", "N"), [("float32", 16384), ("bfloat16", 8192)])
def test_memory_is_of_the_features(dtype: str, N: int) -> None:
    """Peak memory grows with the features, not with the logits, which would take 1 GiB per float32 copy of the matrix
    (4 GiB in all, half a GiB in bfloat16).
    """
    command = [sys.executable, "-m", "benchmarks.losses.peak_memory", "--provider", "fastclip"]
    command += ["--N", str(N), "--D", "512", "--dtype", dtype]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < PEAK_MIB


def test_ops_keep_the_order_of_their_tensors() -> None:
    """The ops keep the order of their tensors: exported programs and the entries of compile caches call them by
    position.
    """
    image, text = pairs(3, 5, 8)
    y = torch.zeros(3, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
    args = image, text, torch.tensor(2.0), *y, 0, False, True, "reference", None, None
    sizes = [len(x) for x in torch.ops.fastclip.contrastive_maxima(*args)]
    assert sizes == [3, 5] * 6  # each statistic gives its rows, then its columns
    assert [len(x) for x in torch.ops.fastclip.contrastive_fwd(*args)] == sizes[:8]
    assert str(torch.ops.fastclip.plain_bwd.default._schema) == (
        "fastclip::plain_bwd(Tensor image, Tensor text, Tensor scale, Tensor saved, float image_weight, "
        "bool normalize, str? backend, Tensor d_loss, bool[] needs) -> (Tensor, Tensor, Tensor)"
    )
