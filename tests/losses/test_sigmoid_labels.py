"""The sigmoid loss with labels, ignored rows and limits, compared with the formula on the whole matrix in fp64."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import fastclip
from fastclip._backends import cuda, reference
from fastclip._backends.cpu import native
from fastclip._backends.problem import Problem
from fastclip.losses.inputs.ties import TIE
from fastclip.ops.sigmoid import Pairs
from fastclip.parity.promised import FP32_GRADIENT, FP64, LOSS, SCALE_GRADIENT
from support.accuracy import counted_products, leaves, pairs, poisoned, random_labels, unit_roundoff
from support.kinds import DEVICE, GPU, each_backend
from support.processes import ended, forked, forks, join_group

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BACKENDS = ["cpu", "reference", "triton"]
SCALE, BIAS = 9.0, -6.0
IGNORED = 3
OPTIONS: dict[str, dict[str, Any]] = {
    "labels": {},
    "self": {"exclude_self": True},
    "ignored": {"ignore_label": IGNORED},
    "self, ignored": {"exclude_self": True, "ignore_label": IGNORED},
    "margin": {"negative_margin": 0.05},
    "self, ignored, margin": {"exclude_self": True, "ignore_label": IGNORED, "negative_margin": -0.1},
    "pairs, margin": {"labels": False, "negative_margin": -0.1},
    "not normalised": {"normalize": False},
    "not normalised, margin": {"normalize": False, "negative_margin": 0.2},
    "sum": {"reduction": "sum"},
}


def counted_pairs(
    cosine: Tensor,
    norms: tuple[Tensor, Tensor],
    labels: tuple[Tensor, Tensor] | None,
    exclude_self: bool,
    negative_margin: float | None,
) -> tuple[Tensor, Tensor]:
    """Return the masks of the positives and of all pairs that count. `cosine`: logits without bias over the scale."""
    itself = torch.eye(*cosine.shape, dtype=torch.bool)
    positive = itself if labels is None else labels[0][:, None] == labels[1]
    counted = ~itself if exclude_self else torch.ones_like(positive)
    positive = positive & counted
    if negative_margin is not None:
        for dim, (own, other) in enumerate((norms, norms[::-1])):
            number = positive.sum(1 - dim)
            mean = torch.where(positive, cosine, 0).sum(1 - dim) / number.clamp_min(1)
            limit = torch.where(number > 0, mean, torch.inf) + negative_margin + TIE * own * other.max()
            counted = counted & (positive | (cosine <= limit.unsqueeze(1 - dim)))
    return positive, counted


def dense(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    labels: tuple[Tensor, Tensor] | None = None,
    *,
    normalize: bool = True,
    exclude_self: bool = False,
    ignore_label: int | None = None,
    negative_margin: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the loss of a positive scale from the whole matrix of logits."""
    if ignore_label is not None and labels is not None:
        rows, cols = (y != ignore_label for y in labels)
        image, text, labels = image[rows], text[cols], (labels[0][rows], labels[1][cols])
    u, v = (F.normalize(x, dim=1) if normalize else x for x in (image, text))
    cosine = u @ v.T
    norms = u.detach().norm(dim=1), v.detach().norm(dim=1)
    positive, counted = counted_pairs(cosine.detach(), norms, labels, exclude_self, negative_margin)
    sign = torch.where(positive, 1.0, -1.0).to(u.dtype)
    total = -(F.logsigmoid(sign * (scale * cosine + bias)) * counted).sum()
    return total / len(image) if reduction == "mean" else total


def problem(name: str, M: int, N: int, D: int, dtype: torch.dtype) -> tuple[list[Tensor], Any, dict[str, Any]]:
    """Return features, labels or None, and the options of a case."""
    options = dict(OPTIONS[name])
    labelled = options.pop("labels", True)
    M = N if not labelled or "exclude_self" in options else M
    labels = random_labels(M, N, max(N // 3, 6)) if labelled else None
    for y in labels or ():
        y[::4] = IGNORED
    if labels is not None and "exclude_self" in options:
        labels = labels[1], labels[1]
    features = [poisoned(x, dtype) for x in pairs(M, N, D, noise=1.5)]
    if not options.get("normalize", True):
        features = [poisoned((x / D**0.5).to(dtype)) for x in features]
    return features, labels, options


def check(name: str, backend: str | None, shape: tuple[int, int, int], dtype: torch.dtype, bias: float = BIAS) -> None:
    """Compare the loss and all gradients with `dense` in fp64."""
    features, labels, options = problem(name, *shape, dtype)
    device = DEVICE if backend == "triton" else "cpu"
    given = tuple(x.detach().to(device).requires_grad_() for x in leaves(*features, SCALE, bias))
    exact = tuple(x.detach().double().cpu().requires_grad_() for x in given)
    named = dict(zip(("image_labels", "text_labels"), (y.to(device) for y in labels or ())))
    loss, expected = (
        fastclip.sigmoid_loss(*given, backend=backend, **named, **options),
        dense(*exact, labels, **options),
    )
    budget = FP64 if dtype == torch.float64 else LOSS
    assert abs(loss.item() - expected.item()) <= budget * expected.item()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    found, true = torch.autograd.grad(loss, given), torch.autograd.grad(expected, exact)
    for what, ours, correct in zip(("image", "text", "scale", "bias"), found, true):
        small = (FP32_GRADIENT if ours.dim() else SCALE_GRADIENT) if dtype != torch.float64 else FP64
        error, size = float((ours.double().cpu() - correct).norm()), float(correct.norm())
        assert error <= (small + 2 * unit_roundoff(dtype)) * size, (what, error, size)
    if "ignore_label" in options:
        for d, y in zip(found, labels):
            assert (y == IGNORED).any() and not d[(y == IGNORED).to(d.device)].any()


@pytest.mark.pairwise
@each_backend(*BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(7, 12, 8), (65, 50, 24), (140, 530, 16)], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_loss_is_that_of_the_formula(name: str, shape: tuple[int, int, int], dtype: torch.dtype, backend: str) -> None:
    if backend == "triton" and not GPU:
        dtype = torch.float16 if dtype == torch.bfloat16 else dtype  # which Triton's interpreter multiplies
        shape = min(shape, (140, 150, 16))  # several tiles; the interpreter is slow
    check(name, backend, shape, dtype)


@pytest.mark.parametrize("name", OPTIONS)
def test_exact_in_fp64(name: str) -> None:
    check(name, None, (30, 40, 12), torch.float64)


@each_backend(*BACKENDS)
@pytest.mark.parametrize("name", ["labels", "pairs, margin", "self, ignored, margin"])
@pytest.mark.parametrize("bias", [-60.0, 40.0])
def test_losses_far_from_0_keep_digits(bias: float, name: str, backend: str) -> None:
    check(name, backend, (70, 90, 16), torch.float32, bias)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_every_instruction_set_has_the_same_pairs(isa: str) -> None:
    try:
        native.module.select_isa(isa)
    except ValueError:
        pytest.skip(f"this processor has no {isa}")
    try:
        for name in OPTIONS:
            check(name, "cpu", (67, 530, 24), torch.float32)
    finally:
        native.module.select_isa("auto")


@each_backend("cpu", "triton")
@pytest.mark.parametrize("name", ["self, ignored, margin", "pairs, margin"])
def test_many_blocks_have_the_same_pairs(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", "0.05")
    check(name, backend, (300, 300, 16), torch.float32)


@each_backend(*BACKENDS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("labelled", [False, True])
def test_a_tie_stays_a_negative(labelled: bool, normalize: bool, backend: str) -> None:
    """Pairs that occur twice are negatives of each other: rounding does not leave them out."""
    half = 300 if backend != "triton" else 70  # the interpreter is slow
    image, text = (poisoned(torch.cat([x, x])) for x in pairs(half, half, 59, aligned=1.0, noise=0.3))
    device = DEVICE if backend == "triton" else "cpu"
    given = image.to(device), text.to(device), SCALE if normalize else 1.0, BIAS
    options: dict[str, Any] = {"normalize": normalize, "reduction": "sum", "backend": backend}
    if labelled:
        y = torch.arange(2 * half, device=given[0].device)
        options |= {"image_labels": y, "text_labels": y}
    everything = fastclip.sigmoid_loss(*given, **options)
    torch.testing.assert_close(fastclip.sigmoid_loss(*given, negative_margin=0.0, **options), everything)
    fewer = fastclip.sigmoid_loss(*given, negative_margin=-0.01, **options)
    assert fewer < everything - 1.0


@each_backend(*BACKENDS)
def test_nan_stays_nan(backend: str) -> None:
    image, text = (x.to(DEVICE if backend == "triton" else "cpu") for x in pairs(70, 70, 16))
    text[3, 2] = torch.nan
    y = torch.arange(70, device=text.device) % 9
    for options in ({}, {"image_labels": y, "text_labels": y}):
        assert fastclip.sigmoid_loss(image, text, 10.0, -10.0, negative_margin=0.0, backend=backend, **options).isnan()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("labels", [False, True])
def test_op_passes_opcheck(backend: str, labels: bool) -> None:
    given = leaves(*pairs(20, 20, 8), 5.0, -4.0)
    y = (torch.arange(20, dtype=torch.int32) % 7, torch.arange(20, dtype=torch.int32) % 5) if labels else (None, None)
    limits = torch.linspace(-3, 3, 20), torch.linspace(2, -2, 20)
    args = Pairs(*given, 20, 0, True, backend, [True] * 4, *y, labels, *limits)
    torch.library.opcheck(torch.ops.fastclip.sigmoid_fwd, args)


@pytest.mark.parametrize("labels", [False, True])
def test_second_derivatives_and_transforms(labels: bool) -> None:
    """The choice of pairs is constant near the features, which are drawn at random."""
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(6, 5, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    scalars = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (5.0, -2.0))
    y = {"image_labels": torch.arange(6) % 4, "text_labels": torch.arange(6) % 3} if labels else {}

    def loss(*given: Tensor) -> Tensor:
        return fastclip.sigmoid_loss(*given, negative_margin=0.0, backend="reference", **y)

    given = image, text, *scalars
    assert torch.autograd.gradcheck(loss, given)
    assert torch.autograd.gradgradcheck(loss, given)
    by_func = torch.func.grad(loss, argnums=(0, 1))(*given)
    for a, b in zip(by_func, torch.autograd.grad(loss(*given), given[:2])):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["self", "margin", "pairs, margin"])
def test_compiles_whole(name: str) -> None:
    features, labels, options = problem(name, 20, 30, 8, torch.float32)
    given = leaves(*features, SCALE, BIAS)
    options |= dict(zip(("image_labels", "text_labels"), labels or ()))

    def loss(*given: Tensor) -> Tensor:
        return fastclip.sigmoid_loss(*given, **options)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), loss(*given), rtol=1e-6, atol=0)
    for a, b in zip(torch.autograd.grad(compiled(*given), given), torch.autograd.grad(loss(*given), given)):
        torch.testing.assert_close(a, b)


def test_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels take no product more than pairs, and limits of labels take one more."""
    operations = counted_products(monkeypatch)
    y = torch.arange(300) % 100
    labels = {"image_labels": y, "text_labels": y}
    for options, products in ((labels, 3), ({"negative_margin": 0.1}, 3), ({**labels, "negative_margin": 0.1}, 4)):
        fastclip.sigmoid_loss(*leaves(*pairs(300, 300, 16), SCALE, BIAS), **options)
        assert len(operations) == products
        operations.clear()


def test_own_labels_are_pairs() -> None:
    given, y = leaves(*pairs(50, 50, 8), SCALE, BIAS), torch.arange(50)
    ours, theirs = fastclip.sigmoid_loss(*given, image_labels=y, text_labels=y), fastclip.sigmoid_loss(*given)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, given), torch.autograd.grad(theirs, given)):
        torch.testing.assert_close(a, b)


def test_a_batch_without_a_positive_has_a_loss() -> None:
    (image, text), y = pairs(4, 6, 8), torch.arange(6)
    loss = fastclip.sigmoid_loss(image, text, SCALE, BIAS, image_labels=y[:4] + 9, text_labels=y, negative_margin=0.0)
    z = SCALE * F.normalize(image) @ F.normalize(text).T + BIAS
    torch.testing.assert_close(loss, F.softplus(z).sum() / 4)


def test_prefixes_take_the_options() -> None:
    (image, text), (y, t) = pairs(30, 40, 16), random_labels(30, 40, 12)
    options = {"logit_bias": BIAS, "image_labels": y, "text_labels": t, "negative_margin": 0.1}
    both = fastclip.matryoshka_loss(image, text, SCALE, prefixes=(4, 16), loss=fastclip.sigmoid_loss, **options)
    each = [fastclip.sigmoid_loss(image[:, :d], text[:, :d], SCALE, **options) for d in (4, 16)]
    torch.testing.assert_close(both, each[0] + each[1])


def test_the_cuda_backend_leaves_labels_and_limits_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_Tiles", None)
    image, text = (x.to(DEVICE, torch.float16) for x in pairs(70, 70, 24))
    scale, bias = (torch.tensor(x, device=DEVICE) for x in (3.0, -2.0))
    labels = torch.arange(70, dtype=torch.int32, device=DEVICE) % 9
    limits = torch.full((70,), 0.5, device=DEVICE), torch.full((70,), -0.5, device=DEVICE)
    for options in ({"labels": (labels, labels)}, {"limits": limits}):
        p = Problem(image, text, scale, **options)
        ours, theirs = (m.sigmoid_fwd(p, bias, 1, [True] * 4, torch.float32) for m in (cuda, reference))
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


SHARDED = ("labels", "self", "ignored", "pairs, margin", "margin", "self, ignored, margin", "not normalised, margin")


def of_whole(name: str) -> tuple[list[Tensor], Any, dict[str, Any]]:
    return problem(name, 18, 18, 8, torch.float64)


def work(rank: int, folder: Path) -> None:
    """Store the losses of a rank's unequal shard, and their gradients."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    join_group(rank, 3, folder)
    own = slice(*((0, 11), (11, 11), (11, 18))[rank])  # the second rank has no row
    found: dict[str, list[Tensor]] = {}
    for name in SHARDED:
        features, labels, options = of_whole(name)
        named = dict(zip(("image_labels", "text_labels"), (y[own] for y in labels or ())))
        for comm in ("gather", "ring"):
            given = leaves(*(x[own] for x in features), SCALE, BIAS)
            loss = fastclip.sigmoid_loss(*given, **named, **options, group=dist.group.WORLD, comm=comm)
            found[f"{name} {comm}"] = [loss.detach(), *torch.autograd.grad(loss, given)]
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@forks
def test_ranks_have_the_loss_of_one_process(tmp_path: Path) -> None:
    for pid in [forked(lambda rank=rank: work(rank, tmp_path), tmp_path / f"said {rank}") for rank in range(3)]:  # type: ignore[misc]
        assert ended(pid, 60) == 0, [path.read_text() for path in tmp_path.glob("said *")]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    for name in SHARDED:
        features, labels, options = of_whole(name)
        given = leaves(*features, SCALE, BIAS)
        one = dense(*given, labels, **options)
        expected = [one.detach(), *torch.autograd.grad(one, given)]
        for comm in ("gather", "ring"):
            for shards, true in zip(zip(*(found[f"{name} {comm}"] for found in ranks)), expected, strict=True):
                # DDP's mean over the ranks; every rank has the gradients of its own rows
                whole = torch.cat(shards) / 3 if true.dim() else torch.stack(shards).mean()
                torch.testing.assert_close(whole, true, rtol=1e-11, atol=1e-11)
