"""The Triton backend against fp64 truth and dense torch: on a GPU, or without one in Triton's interpreter.

The interpreter runs the launchers that users call. bfloat16 is left to `test_gpu.py`: the interpreter multiplies it
wrongly, and the backend refuses it there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from promises import check, counted_products, pairs, poisoned, truth
from test_contrastive_accuracy import LABELS, random_labels
from torch import Tensor

import fastclip
from fastclip._backends import reference
from fastclip._backends.problem import Problem
from fastclip.ops import contrastive_maxima, contrastive_statistics

pytest.importorskip("triton")
from fastclip.triton_kernels import contrastive_bwd, contrastive_fwd, launch, sigmoid_fwd
from fastclip.triton_kernels.tile import CONSTANTS, REPAIR

from fastclip import triton_kernels
from fastclip._backends import triton as backend

if backend.missing():
    pytest.skip(str(backend.missing()), allow_module_level=True)

GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] if GPU else []
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16]

# (M, N, D) by regime: tiles are 64 or 128 rows, 64 or 128 columns, 32 or 64 features
SHAPES = [
    (1, 1, 8),  # a single pair: no negatives
    (2, 2, 1),  # one-dimensional features
    (7, 7, 3),  # less than anything
    (128, 128, 64),  # one tile
    (129, 129, 59),  # one row and one column past, rows that are not aligned
    (150, 150, 72),  # a D tail
    (40, 40, 640),  # RN50x4
    (33, 33, 1376),  # ALIGN
]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What torch.empty returns is filled with NaN: an output that is not written is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["pointers", "descriptors"])
def accesses(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How tiles are read: both ways, whatever this machine would choose."""
    if GPU and request.param == "descriptors" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("this GPU has no tensor memory accelerator")
    monkeypatch.setattr(launch, "uses_descriptors", lambda x: request.param == "descriptors")
    return request.param


def kept(x: Tensor) -> Tensor:
    """On the device with its strides, inside its frame of NaN."""
    return x if DEVICE == "cpu" else poisoned(x).cuda() if x.dim() == 2 else x.cuda()


def triton_loss(**options: Any) -> Callable[..., Tensor]:
    if (labels := options.pop("labels", None)) is not None:
        options["image_labels"], options["text_labels"] = (y.to(DEVICE) for y in labels)

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        value = fastclip.contrastive_loss(kept(image), kept(text), scale.to(DEVICE), backend="triton", **options)
        return value.to("cpu")

    return loss


class Launches:
    """Kernels launched, and whether the device asked for a repair."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.arguments: list[tuple[Any, ...]] = []
        self.constants: list[Tensor] = []
        real = launch.launch

        def watched(kernel: Any, grid: int, *args: Any, **options: Any) -> None:
            real(kernel, grid, *args, **options)
            self.names.append(kernel.fn.__name__)
            self.arguments.append(args)
            self.constants += [
                x for x in args if isinstance(x, Tensor) and x.shape == (CONSTANTS,) and "repair" in self.names[-1]
            ]

        for module in (contrastive_fwd, contrastive_bwd, sigmoid_fwd):
            monkeypatch.setattr(module, "launch", watched)

    @property
    def repaired(self) -> list[bool]:
        return [bool(x[REPAIR.value] != 0) for x in self.constants]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    return Launches(monkeypatch)


@pytest.mark.parametrize("scale", [0.0, 14.3, 100.0, -5.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradients_accurate(dtype: torch.dtype, shape: tuple[int, int, int], scale: float) -> None:
    image, text = (poisoned(x, dtype) for x in pairs(*shape))
    check(triton_loss(), image, text, scale)


@pytest.mark.parametrize("labels", [False, True], ids=["diagonal", "labels"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_accesses_accurate(accesses: str, dtype: torch.dtype, labels: bool, launches: Launches) -> None:
    M, N = (100, 140) if labels else (140, 140)
    image, text = (poisoned(x, dtype) for x in pairs(M, N, 72))
    y = random_labels(M, N, 40) if labels else None
    check(triton_loss(labels=y), image, text, 14.3, labels=y)
    tile = next(args for name, args in zip(launches.names, launches.arguments) if name == "contrastive_bwd_kernel")
    assert isinstance(tile[0], Tensor) == (accesses == "pointers")


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_labels_accurate(name: str, dtype: torch.dtype) -> None:
    labels = LABELS[name]
    image, text = (poisoned(x, dtype) for x in pairs(len(labels[0]), len(labels[1]), 24))
    for options in ({}, {"label_smoothing": 0.1, "image_weight": 0.25}):
        check(triton_loss(labels=labels, **options), image, text, 14.3, labels=labels, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_self_pairs_accurate(dtype: torch.dtype) -> None:
    """SimCLR and SupCon: a row's own column is neither positive nor negative."""
    y = torch.arange(140) % 70
    image, text = (poisoned(x, dtype) for x in pairs(140, 140, 24))
    options = {"labels": (y, y), "exclude_self": True}
    check(triton_loss(**options), image, text, 10.0, **options)


@pytest.mark.parametrize(("noise", "loss"), [(0.12, 1e-9), (0.06, 1e-20)])
@pytest.mark.parametrize("labels", [False, True], ids=["diagonal", "unique labels"])
def test_confident_loss_keeps_digits(noise: float, loss: float, labels: bool) -> None:
    image, text = pairs(300, 300, 256, aligned=1.0, noise=noise)
    y = (torch.arange(300) * 7 % 300,) * 2 if labels else None
    found = check(triton_loss(labels=y), image, text, 28.0 if loss > 1e-12 else 66.0, labels=y, base_line=False)
    assert loss / 1e4 < float(found.loss) < loss * 1e1, "the case no longer tests what its name says"


@pytest.mark.parametrize("offset", [0, 5, -3, 60, 1000, -1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_offset_of_a_shard(dtype: torch.dtype, offset: int) -> None:
    """Row i's positive is column i + offset, if there is one; everything equals the reference's fp64."""
    image, text = (x.to(dtype) for x in pairs(50, 130, 24))

    def run(dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
        x = [t.to(device, dtype).requires_grad_() for t in (image, text)]
        wide = torch.promote_types(dtype, torch.float32)
        x.append(torch.tensor(9.0, dtype=wide, device=device, requires_grad=True))
        stats = contrastive_statistics(*x, offset=offset, backend=backend)[:4]
        total = sum((k + 1) * (1e-2 * s[s.isfinite()]).sum() for k, s in enumerate(stats))
        return [t.double().cpu() for t in (*(s.detach() for s in stats), *torch.autograd.grad(total, x))]

    ours, true = run(dtype, DEVICE, "triton"), run(torch.float64, "cpu", "reference")
    for a, b in zip(ours[:4], true[:4]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(ours[4:], true[4:]):
        assert (a - b).norm() <= (1e-5 if dtype == torch.float32 else 1e-3) * b.norm()


def uneven(M: int, N: int, D: int = 16) -> tuple[Tensor, Tensor]:
    """Norms from 0.1 to 30 in one batch: logits lie thousands apart, no single offset can serve them."""
    image, text = pairs(M, N, D)
    rows, cols = torch.logspace(-1, 1.48, M), torch.logspace(1.48, -1, N)
    return image * (rows / image.norm(dim=1))[:, None], text * (cols / text.norm(dim=1))[:, None]


@pytest.mark.parametrize("labels", [False, True], ids=["diagonal", "labels"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repair_met_by_nature(dtype: torch.dtype, labels: bool, launches: Launches) -> None:
    M, N = (130, 200) if labels else (200, 200)
    image, text = (poisoned(x, dtype) for x in uneven(M, N))
    y = random_labels(M, N, 30) if labels else None
    check(triton_loss(labels=y, normalize=False), image, text, 5.0, labels=y, normalize=False)
    assert launches.repaired == [True, True], "forward and backward must have needed it"


def test_repair_of_opposite_features(launches: Launches) -> None:
    """Normalised, scale 100, every negative cosine near -1 or 1 / 2: below what the offset reaches."""
    image = torch.randn(2, 24).repeat_interleave(2, 0)
    image, text = image + 0.01 * torch.randn(4, 24), -image
    check(triton_loss(), image[:2], text[:2], 100.0)
    assert launches.repaired[0]


def test_repair_not_needed_for_ordinary_batches(launches: Launches) -> None:
    image, text = pairs(130, 130, 64)
    for scale in (10.0, 60.0, 100.0):
        check(triton_loss(), image, text, scale)
    assert launches.repaired == [False] * 6


@pytest.mark.skipif(GPU, reason="compiled kernels do not see the changed constants")
@pytest.mark.parametrize("labels", [False, True], ids=["diagonal", "labels"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repair_forced(
    monkeypatch: pytest.MonkeyPatch, accesses: str, dtype: torch.dtype, labels: bool, launches: Launches
) -> None:
    """What the repair computes is right for ordinary batches too: the guards are set so that none passes."""
    monkeypatch.setattr(contrastive_fwd, "_SAFE_SUM", torch.inf)
    monkeypatch.setattr(contrastive_bwd, "_LOWEST", torch.inf)
    M, N = (100, 140) if labels else (140, 140)
    image, text = (poisoned(x, dtype) for x in pairs(M, N, 40))
    y = random_labels(M, N, 40) if labels else None
    check(triton_loss(labels=y), image, text, 14.3, labels=y)
    assert launches.repaired == [True, True]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("labels", [False, True], ids=["diagonal", "labels"])
def test_panels_and_blocks(
    monkeypatch: pytest.MonkeyPatch, launches: Launches, labels: bool, normalize: bool, dtype: torch.dtype
) -> None:
    """A workspace for a few tiles: row panels forward, row chunks and column blocks backward, repair included."""
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", "0.004")
    M, N = (140, 260) if labels else (260, 260)
    image, text = (poisoned(x, dtype) for x in (pairs(M, N, 24) if normalize else uneven(M, N)))
    y = random_labels(M, N, 60) if labels else None
    check(triton_loss(labels=y, normalize=normalize), image, text, 5.0, labels=y, normalize=normalize)
    assert launches.names.count("contrastive_fwd_kernel") > 1
    assert launches.names.count("contrastive_bwd_kernel") == (6 if labels else 9)
    assert launches.repaired == [not normalize] * len(launches.repaired)


def test_workspace_bounded(monkeypatch: pytest.MonkeyPatch, launches: Launches) -> None:
    """Partial sums and weights, whatever the batch."""
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", "0.125")
    triton_loss()(*(x.half().requires_grad_() for x in pairs(400, 400, 8)), torch.tensor(5.0)).backward()
    for name, args in zip(launches.names, launches.arguments):
        tensors = [getattr(x, "base", x) for x in args]
        sizes = [x.untyped_storage().nbytes() for x in tensors if isinstance(x, Tensor)]
        if name == "contrastive_fwd_kernel":
            assert sum(sizes[-2:]) <= 2**17
        elif name == "contrastive_bwd_kernel":
            assert max(sizes) <= 2**17


def test_work_and_launches(monkeypatch: pytest.MonkeyPatch, launches: Launches) -> None:
    """Forward 2 M N D in five launches with the norms, backward 6 M N D in nine with the products."""
    operations = counted_products(monkeypatch)
    M = N = 256
    D = 64
    image, text = (x.requires_grad_() for x in pairs(M, N, D))
    loss = triton_loss()(image, text, torch.tensor(5.0))
    kernel, reduce = "contrastive_fwd_kernel", "contrastive_fwd_reduce_kernel"
    assert launches.names == [kernel, reduce, "contrastive_fwd_repair_kernel", reduce] and operations == []
    loss.backward()
    assert launches.names[4:] == [
        "contrastive_bwd_largest_kernel",
        "contrastive_bwd_vectors_kernel",
        "contrastive_bwd_vectors_kernel",
        "contrastive_bwd_kernel",
        "contrastive_bwd_repair_kernel",
    ]
    assert operations == [2 * M * N * D] * 2


def test_every_subset_of_gradients() -> None:
    image, text = pairs(60, 60, 16)
    inputs = [kept(x) for x in (image, text)] + [torch.tensor(9.0, device=DEVICE)]
    full = [x.detach().clone().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(fastclip.contrastive_loss(*full, backend="triton"), full)
    for subset in range(1, 8):
        given = [x.detach().clone().requires_grad_(bool(subset >> k & 1)) for k, x in enumerate(inputs)]
        fastclip.contrastive_loss(*given, backend="triton").backward()
        for k, x in enumerate(given):
            assert (x.grad is not None) == bool(subset >> k & 1)
            if x.grad is not None:
                torch.testing.assert_close(x.grad, expected[k], rtol=0, atol=0)


def test_bitwise_repeatable() -> None:
    image, text = (x.half() for x in pairs(140, 140, 40))

    def run() -> list[Tensor]:
        x = [kept(t).detach().requires_grad_() for t in (image, text)]
        loss = fastclip.contrastive_loss(*x, 20.0, backend="triton")
        return [loss.detach(), *torch.autograd.grad(loss, x)]

    first = run()
    for _ in range(250 if GPU else 2):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


def test_swapped_modalities_swap_gradients() -> None:
    image, text = (kept(x).detach().requires_grad_() for x in pairs(130, 130, 24))
    a = torch.autograd.grad(fastclip.contrastive_loss(image, text, 14.0, backend="triton"), (image, text))
    b = torch.autograd.grad(fastclip.contrastive_loss(text, image, 14.0, backend="triton"), (image, text))
    for x, y in zip(a, b):
        assert (x - y).norm() < 1e-6 * x.norm()


@pytest.mark.parametrize(("factor", "size"), [(-3.0, 1.0), (65536.0, 1.0), (1e25, 1.0), (1e-30, 1.0), (1e-37, 1e-6)])
def test_upstream_gradient_scales(factor: float, size: float) -> None:
    """From fp16 loss scaling to the subnormal weights of a mean over very many: they neither overflow nor flush."""
    image, text = (size * x for x in pairs(70, 70, 16))
    expected = truth(image, text, 14.3)
    image.requires_grad_()
    triton_loss()(image, text, torch.tensor(14.3)).backward(torch.tensor(factor))
    error = (image.grad.double() / factor - expected.d_image).norm() / expected.d_image.norm()
    assert error < 3e-6


@pytest.mark.parametrize(("size", "factor"), [(1.0, 2.0**16), (300.0, 2.0**16), (2.0**-8, 2.0**-10)])
def test_fp16_weights_do_not_flush(size: float, factor: float) -> None:
    """Weights of a mean loss are 1 / N^2; with the inverse norms of rows of norm 300, 1e-10: less than fp16 holds."""
    image, text = ((size * x / x.norm(dim=1, keepdim=True)).half() for x in pairs(200, 200, 16))
    image.requires_grad_()
    (triton_loss()(image, text, torch.tensor(5.0)) * factor).backward()
    expected = truth(image, text, 5.0)
    error = (image.grad.double() / factor - expected.d_image).norm() / expected.d_image.norm()
    assert error < 2e-3


def test_extreme_norms_finite_and_accurate() -> None:
    image, text = pairs(66, 66, 16)
    factor = torch.ones(66, 1)
    factor[3], factor[7], factor[11] = 1e30, 1e20, 1e-6
    check(triton_loss(), image * factor, text * factor.flip(0), 14.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_rows_finite(dtype: torch.dtype) -> None:
    image, text = (poisoned(x, dtype) for x in pairs(20, 20, 8))
    image[3], text[3], text[5] = 0, 0, 0
    a, b, s = image.clone().requires_grad_(), text.clone().requires_grad_(), torch.tensor(14.3, requires_grad=True)
    triton_loss()(a, b, s).backward()
    expected = truth(image, text, 14.3)
    others = torch.arange(20) != 3
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    error = (a.grad.double() - expected.d_image)[others].norm() / expected.d_image[others].norm()
    assert error < tolerance, "a zero row spoils the others"
    assert s.grad.isfinite()
    if dtype != torch.float16:  # 14.3 / 1e-12 is no float16, as with torch.nn.functional.normalize
        assert a.grad.isfinite().all() and b.grad.isfinite().all()


def test_norm_below_the_bound_is_a_constant() -> None:
    """As in torch.nn.functional.normalize: no projection of the gradient there."""
    image, text = pairs(20, 20, 8)
    image[3] *= 1e-14
    expected = truth(image, text, 14.3).d_image[3]
    image.requires_grad_()
    triton_loss()(image, text, torch.tensor(14.3)).backward()
    assert (image.grad[3].double() - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("place", [0, 129])
def test_nan_and_inf_propagate(value: float, normalize: bool, place: int) -> None:
    image, text = pairs(130, 130, 8)
    image[place, 2] = value
    image.requires_grad_()
    loss = triton_loss(normalize=normalize)(image, text, torch.tensor(14.3))
    assert not loss.isfinite()
    (gradient,) = torch.autograd.grad(loss, image)
    assert not gradient.isfinite().all()


@pytest.mark.parametrize("layout", ["transposed", "expanded", "every other column", "one row", "unaligned"])
@pytest.mark.parametrize("normalize", [True, False])
def test_layouts(layout: str, normalize: bool, accesses: str) -> None:
    image, text = pairs(40, 40, 24)
    if layout == "transposed":
        image = image.T.contiguous().T
    elif layout == "expanded":
        image = image[:1].expand(40, 24)
    elif layout == "every other column":
        image, text = (torch.cat([x, x], 1)[:, ::2] for x in (image, text))
    elif layout == "one row":
        image, text = image[:1], text[:1]
    else:
        image = torch.cat([torch.zeros(1), image.flatten()])[1:].view(40, 24)
    loss = triton_loss(normalize=normalize)
    slack = 8.0 if layout == "expanded" else 1.0  # equal rows round in one direction
    check(lambda *x: loss(*x), image, text, 3.0, normalize=normalize, slack=slack)
    x, y = image.to(DEVICE), text.to(DEVICE)
    ours = fastclip.contrastive_loss(x, y, 3.0, normalize=normalize, backend="triton")
    dense = fastclip.contrastive_loss(image, text, 3.0, normalize=normalize, backend="reference")
    torch.testing.assert_close(ours.cpu(), dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("D", [6, 12, 100])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_side_aligned(dtype: torch.dtype, which: int, normalize: bool, D: int) -> None:
    """One side lies as the products want it, the other does not."""
    sides = [x.to(dtype) for x in pairs(9, 9, D)]
    sides[which] = F.pad(sides[which], (0, 16 - D % 8), value=torch.nan)[:, :D]
    sides[1 - which] = torch.cat([torch.zeros(1, dtype=dtype), sides[1 - which].flatten()])[1:].view(9, D)
    expected = truth(*sides, 0.5, normalize=normalize)
    given = [x.detach().requires_grad_() for x in sides]  # a copy would lose the layout
    found = torch.autograd.grad(triton_loss(normalize=normalize)(*given, torch.tensor(0.5)), given)
    for ours, true in zip(found, (expected.d_image, expected.d_text)):
        assert (ours.double() - true).norm() <= (1e-5 if dtype == torch.float32 else 2e-3) * true.norm()


def test_largest_logits_of_nan_are_nan() -> None:
    image, text = (x.to(DEVICE) for x in pairs(9, 9, 8))
    text[4, 2] = torch.nan
    _, top = contrastive_maxima(image, text, torch.tensor(3.0, device=DEVICE), backend="triton")
    assert top.row_neg.isnan().tolist() == [i != 4 for i in range(9)]
    assert top.col_neg.isnan().tolist() == [j == 4 for j in range(9)]


def test_strided_labels() -> None:
    image, text = (x.to(DEVICE) for x in pairs(30, 30, 8))
    y = torch.randint(0, 9, (60,), dtype=torch.int32, device=DEVICE)[::2]
    p = Problem(image, text, torch.tensor(3.0, device=DEVICE), (y, y.flip(0)), 0, False, True)
    for a, b in zip(backend.contrastive_fwd(p), reference.contrastive_fwd(p)):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-5, atol=1e-5)


def test_rows_beyond_2_to_the_31() -> None:
    """Element offsets of the last rows do not fit into 32 bits."""
    torch.use_deterministic_algorithms(False)  # the pages between the rows are never touched
    M, stride = 2100, 2**20
    wide = torch.empty(M * stride, dtype=torch.float16, device=DEVICE)
    assert wide.numel() > 2**31
    image, text = wide.as_strided((M, 8), (stride, 1)), torch.randn(3, 8, dtype=torch.float16, device=DEVICE)
    image.copy_(torch.randn(M, 8))
    labels = torch.zeros(M, dtype=torch.int32, device=DEVICE), torch.arange(3, dtype=torch.int32, device=DEVICE)
    p = Problem(image, text, torch.tensor(2.0, device=DEVICE), labels, 0, False, False)
    ours = backend.contrastive_fwd(p)
    true = reference.contrastive_fwd(p._replace(image=image.contiguous()))
    for a, b in zip(ours, true):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("labels", [False, True], ids=["diagonal", "labels"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stats_equal_the_reference(dtype: torch.dtype, labels: bool) -> None:
    image, text = (x.to(dtype) for x in pairs(150, 150, 24))
    text[7] = text[9]  # a tie
    y = {}
    if labels:
        y = dict(zip(("image_labels", "text_labels"), random_labels(150, 150, 60)))
    ours = fastclip.contrastive_stats(
        image.to(DEVICE), text.to(DEVICE), 14.3, backend="triton", **{k: v.to(DEVICE) for k, v in y.items()}
    )
    true = fastclip.contrastive_stats(image.double(), text.double(), 14.3, backend="reference", **y)
    for name, a, b in zip(ours._fields, ours, true):
        if a.dtype == torch.bool:
            assert torch.equal(a.cpu(), b), name
        else:
            torch.testing.assert_close(a.cpu().double(), b, rtol=1e-5, atol=1e-5)


def sigmoid_of(**options: Any) -> Callable[..., Tensor]:
    def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        inputs = kept(image), kept(text), scale.to(DEVICE), bias.to(DEVICE)
        return fastclip.sigmoid_loss(*inputs, backend="triton", **options).to("cpu")

    return loss


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (100.0, -60.0), (0.0, -3.0), (-5.0, 2.0)])
@pytest.mark.parametrize("shape", [(1, 8), (7, 3), (129, 59), (300, 72)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sigmoid_accurate(dtype: torch.dtype, shape: tuple[int, int], scale: float, bias: float) -> None:
    N, D = shape
    image, text = (poisoned(x, dtype) for x in pairs(N, N, D))
    check(sigmoid_of(), image, text, scale, bias=bias)


def test_sigmoid_both_accesses_and_blocks(accesses: str, monkeypatch: pytest.MonkeyPatch, launches: Launches) -> None:
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", "0.04")
    image, text = (poisoned(x, torch.float16) for x in pairs(200, 200, 24))
    check(sigmoid_of(), image, text, 10.0, bias=-10.0)
    image, text = (poisoned(x, torch.float32) for x in uneven(200, 200))
    check(sigmoid_of(normalize=False), image, text, 0.05, bias=-4.0, normalize=False)
    assert launches.names.count("sigmoid_fwd_kernel") == 8


def test_sigmoid_of_a_solved_batch_keeps_digits() -> None:
    image, text = pairs(100, 100, 64, aligned=1.0, noise=0.05)
    found = check(sigmoid_of(), image, text, 200.0, bias=-130.0)
    assert float(found.loss) < 1e-15


def test_sigmoid_without_gradients_multiplies_once(monkeypatch: pytest.MonkeyPatch, launches: Launches) -> None:
    operations = counted_products(monkeypatch)
    image, text = pairs(128, 128, 32)
    sigmoid_of()(image, text, torch.tensor(10.0), torch.tensor(-10.0))
    assert launches.names.count("sigmoid_fwd_kernel") == 1 and operations == []
    sigmoid_of()(image.requires_grad_(), text.requires_grad_(), torch.tensor(10.0), torch.tensor(-10.0))
    assert operations == [2 * 128 * 128 * 32] * 2


def test_old_triton_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "TRITON", "3.5.1")
    backend._import_error.cache_clear()
    try:
        assert fastclip.backends()["triton"] == "it needs Triton 3.6 or newer, this is 3.5.1"
        with pytest.raises(RuntimeError, match=r"cannot serve this call: it needs Triton 3\.6 or newer"):
            fastclip.contrastive_loss(torch.eye(4), torch.eye(4), backend="triton")
    finally:
        backend._import_error.cache_clear()


def test_without_a_gpu_there_is_a_reason() -> None:
    code = "import fastclip; print(fastclip.backends()['triton'])"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("torch sees no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU")


@pytest.mark.skipif(GPU, reason="what the interpreter does not serve")
def test_interpreter_serves_by_name_only() -> None:
    image, text = pairs(8, 8, 4)
    assert fastclip.backends()["triton"] == "available"
    assert backend.refuses(image, named=True) is None
    assert "by name" in str(backend.refuses(image, named=False))
    with pytest.raises(RuntimeError, match="bfloat16 wrongly"):
        fastclip.contrastive_loss(image.bfloat16(), text.bfloat16(), 5.0, backend="triton")
    with pytest.raises(RuntimeError, match="serves float32, bfloat16 and float16, not float64"):
        fastclip.contrastive_loss(image.double(), text.double(), 5.0, backend="triton")
