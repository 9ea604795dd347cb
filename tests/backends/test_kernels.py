"""The GPU backends' contrastive loss against fp64 truth and dense torch, by the launchers that users call.

On a GPU, or without one in Triton's interpreter and csrc/tests' emulator of Hopper.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastclip
from fastclip._backends import cuda, reference, triton
from fastclip._backends.problem import Problem
from fastclip.ops import contrastive_statistics
from support.accuracy import LABELS, check, counted_products, pairs, poisoned, random_labels, truth
from support.kernels import DEVICE, FP16_KINDS, FP32_KINDS, GPU, KINDS, WIDE_KINDS, Kind, Launches, kept, uneven

MODULES = {"triton": triton, "cuda": cuda}
pytestmark = [pytest.mark.usefixtures("poisoned_memory"), *([pytest.mark.gpu] if GPU else [])]

# (M, N, D) by regime: tiles are 64 or 128 rows, 64, 128 or 192 columns, 32 or 64 features
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


@pytest.mark.parametrize("kind", KINDS, ids=str, indirect=True)
@pytest.mark.parametrize("scale", [0.0, 14.3, 100.0, -5.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients_accurate(kind: Kind, shape: tuple[int, int, int], scale: float) -> None:
    image, text = kind.pairs(*shape)
    check(kind.loss(), image, text, scale)


@pytest.mark.parametrize("kind", KINDS, ids=str, indirect=True)
@pytest.mark.parametrize("name", LABELS)
def test_labels_accurate(name: str, kind: Kind) -> None:
    labels = LABELS[name]
    image, text = kind.pairs(len(labels[0]), len(labels[1]), 24)
    for options in ({}, {"label_smoothing": 0.1, "image_weight": 0.25}):
        check(kind.loss(labels=labels, **options), image, text, 14.3, labels=labels, **options)


@pytest.mark.parametrize("kind", KINDS, ids=str, indirect=True)
def test_self_pairs_accurate(kind: Kind) -> None:
    """SimCLR and SupCon: a row's own column is neither positive nor negative."""
    y = torch.arange(140) % 70
    image, text = kind.pairs(140, 140, 24)
    options = {"labels": (y, y), "exclude_self": True}
    check(kind.loss(**options), image, text, 10.0, **options)


@pytest.mark.parametrize("kind", KINDS, ids=str, indirect=True)
@pytest.mark.parametrize(("noise", "loss"), [(0.12, 1e-9), (0.06, 1e-20)])
@pytest.mark.parametrize("labels", [False, True], ids=["diagonal", "unique labels"])
def test_confident_loss_keeps_digits(kind: Kind, noise: float, loss: float, labels: bool) -> None:
    image, text = kind.pairs(300, 300, 256, aligned=1.0, noise=noise)
    y = (torch.arange(300) * 7 % 300,) * 2 if labels else None
    scale = 28.0 if loss > 1e-12 else 66.0
    logit_error = kind.logit_error(scale, 256) if labels else 0.0
    found = check(kind.loss(labels=y), image, text, scale, labels=y, base_line=False, logit_error=logit_error)
    assert loss / 1e4 < float(found.loss) < loss * 1e1, "the case no longer tests what its name says"


@pytest.mark.parametrize("kind", KINDS, ids=str, indirect=True)
@pytest.mark.parametrize("offset", [0, 5, -3, 60, 1000, -1000])
def test_offset_of_a_shard(kind: Kind, offset: int) -> None:
    """Row i's positive is column i + offset, if there is one; everything equals the reference's fp64."""
    image, text = (x.to(kind.dtype) for x in pairs(50, 130, 24))

    def run(dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
        x = [t.to(device, dtype).requires_grad_() for t in (image, text)]
        wide = torch.promote_types(dtype, torch.float32)
        x.append(torch.tensor(9.0, dtype=wide, device=device, requires_grad=True))
        stats = contrastive_statistics(*x, offset=offset, backend=backend)[:4]
        total = sum((k + 1) * (1e-2 * s[s.isfinite()]).sum() for k, s in enumerate(stats))
        return [t.double().cpu() for t in (*(s.detach() for s in stats), *torch.autograd.grad(total, x))]

    ours, true = run(kind.dtype, DEVICE, kind.backend), run(torch.float64, "cpu", "reference")
    for a, b in zip(ours[:4], true[:4]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(ours[4:], true[4:]):
        assert (a - b).norm() <= kind.tolerance(1e-5, 1e-3) * b.norm()


@pytest.mark.parametrize("kind", KINDS, ids=str, indirect=True)
@pytest.mark.parametrize("labels", [False, True], ids=["diagonal", "labels"])
def test_repair_met_by_nature(kind: Kind, labels: bool, launches: Launches) -> None:
    M, N = (130, 200) if labels else (200, 200)
    image, text = (poisoned(x, kind.dtype) for x in uneven(M, N))
    y = random_labels(M, N, 30) if labels else None
    check(kind.loss(labels=y, normalize=False), image, text, 5.0, labels=y, normalize=False)
    assert launches.repaired == [True, True], "forward and backward must have needed it"


@pytest.mark.parametrize("kind", KINDS, ids=str, indirect=True)
def test_repair_of_opposite_features(kind: Kind, launches: Launches) -> None:
    """Normalised, scale 100, every negative cosine near -1 or 1 / 2: below what the offset reaches."""
    image = torch.randn(2, 24).repeat_interleave(2, 0)
    image, text = (poisoned(x, kind.dtype) for x in (image + 0.01 * torch.randn(4, 24), -image))
    check(kind.loss(), image[:2], text[:2], 100.0)
    assert launches.repaired[0]


@pytest.mark.parametrize("kind", KINDS, ids=str, indirect=True)
def test_repair_not_needed_for_ordinary_batches(kind: Kind, launches: Launches) -> None:
    image, text = kind.pairs(130, 130, 64)
    for scale in (10.0, 60.0, 100.0):
        check(kind.loss(), image, text, scale)
    assert launches.repaired == [False] * 6


@pytest.mark.parametrize("kind", KINDS, ids=str, indirect=True)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("labels", [False, True], ids=["diagonal", "labels"])
def test_panels_and_blocks(
    monkeypatch: pytest.MonkeyPatch, launches: Launches, labels: bool, normalize: bool, kind: Kind
) -> None:
    """A workspace for a few tiles: row panels forward, row chunks and column blocks backward, repair included."""
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", "0.004")
    M, N = (140, 260) if labels else (260, 260)
    image, text = (poisoned(x, kind.dtype) for x in (pairs(M, N, 24) if normalize else uneven(M, N)))
    y = random_labels(M, N, 60) if labels else None
    check(kind.loss(labels=y, normalize=normalize), image, text, 5.0, labels=y, normalize=normalize)
    assert launches.names.count("contrastive_fwd_kernel") > 1
    assert launches.names.count("contrastive_bwd_kernel") == (6 if labels else 9)
    assert launches.repaired == [not normalize] * len(launches.repaired)


@pytest.mark.parametrize("kind", KINDS, ids=str, indirect=True)
def test_workspace_bounded(kind: Kind, monkeypatch: pytest.MonkeyPatch, launches: Launches) -> None:
    """Partial sums and weights, whatever the batch."""
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", "0.125")
    kind.loss()(*(x.requires_grad_() for x in kind.pairs(400, 400, 8)), torch.tensor(5.0)).backward()
    for name in ("contrastive_fwd_kernel", "contrastive_bwd_kernel"):
        assert launches.tensors(name)
        for tensors in launches.tensors(name):
            sizes = sorted(x.untyped_storage().nbytes() for x in tensors)
            assert sum(sizes[-2:] if "fwd" in name else sizes[-1:]) <= 2**17


@pytest.mark.parametrize("kind", KINDS, ids=str, indirect=True)
def test_work_and_launches(kind: Kind, monkeypatch: pytest.MonkeyPatch, launches: Launches) -> None:
    """Forward 2 M N D in five launches with the norms, backward 6 M N D in seven with the products and the finish."""
    operations = counted_products(monkeypatch)
    M = N = 256
    D = 64
    image, text = (x.to(kind.dtype).requires_grad_() for x in pairs(M, N, D))
    loss = kind.loss()(image, text, torch.tensor(5.0))
    kernel, reduce = "contrastive_fwd_kernel", "contrastive_fwd_reduce_kernel"
    assert launches.names == [kernel, reduce, "contrastive_fwd_repair_kernel", reduce] and operations == []
    loss.backward()
    assert launches.names[4:] == [
        "contrastive_bwd_largest_kernel",
        "contrastive_bwd_vectors_kernel",
        "contrastive_bwd_kernel",
        "contrastive_bwd_repair_kernel",
    ]
    assert operations == [2 * M * N * D] * 2


@pytest.mark.parametrize("kind", KINDS, ids=str, indirect=True)
def test_every_subset_of_gradients(kind: Kind) -> None:
    image, text = kind.pairs(60, 60, 16)
    inputs = [kept(x) for x in (image, text)] + [torch.tensor(9.0, device=DEVICE)]
    full = [x.detach().clone().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(fastclip.contrastive_loss(*full, backend=kind.backend), full)
    for subset in range(1, 8):
        given = [x.detach().clone().requires_grad_(bool(subset >> k & 1)) for k, x in enumerate(inputs)]
        fastclip.contrastive_loss(*given, backend=kind.backend).backward()
        for k, x in enumerate(given):
            assert (x.grad is not None) == bool(subset >> k & 1)
            if x.grad is not None:
                torch.testing.assert_close(x.grad, expected[k], rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS, ids=str, indirect=True)
def test_bitwise_repeatable(kind: Kind) -> None:
    image, text = kind.pairs(140, 140, 40)

    def run() -> list[Tensor]:
        x = [kept(t).detach().requires_grad_() for t in (image, text)]
        loss = fastclip.contrastive_loss(*x, 20.0, backend=kind.backend)
        return [loss.detach(), *torch.autograd.grad(loss, x)]

    first = run()
    for _ in range(250 if GPU else 2):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


@pytest.mark.parametrize("kind", KINDS, ids=str, indirect=True)
def test_swapped_modalities_swap_gradients(kind: Kind) -> None:
    image, text = (kept(x).detach().requires_grad_() for x in kind.pairs(130, 130, 24))
    a = torch.autograd.grad(fastclip.contrastive_loss(image, text, 14.0, backend=kind.backend), (image, text))
    b = torch.autograd.grad(fastclip.contrastive_loss(text, image, 14.0, backend=kind.backend), (image, text))
    for x, y in zip(a, b):
        assert (x - y).double().norm() <= kind.tolerance(1e-6, 2e-3) * x.double().norm()


@pytest.mark.parametrize("kind", WIDE_KINDS, ids=str, indirect=True)
@pytest.mark.parametrize(("factor", "size"), [(-3.0, 1.0), (65536.0, 1.0), (1e25, 1.0), (1e-30, 1.0), (1e-37, 1e-6)])
def test_upstream_gradient_scales(kind: Kind, factor: float, size: float) -> None:
    """From fp16 loss scaling to the subnormal weights of a mean over very many: they neither overflow nor flush."""
    image, text = (size * x for x in kind.pairs(70, 70, 16))
    expected = truth(image, text, 14.3)
    image.requires_grad_()
    kind.loss()(image, text, torch.tensor(14.3)).backward(torch.tensor(factor))
    error = (image.grad.double() / factor - expected.d_image).norm() / expected.d_image.norm()
    assert error < kind.tolerance(3e-6, 2e-3)


@pytest.mark.parametrize("kind", FP16_KINDS, ids=str, indirect=True)
@pytest.mark.parametrize(("size", "factor"), [(1.0, 2.0**16), (300.0, 2.0**16), (2.0**-8, 2.0**-10)])
def test_fp16_weights_do_not_flush(kind: Kind, size: float, factor: float) -> None:
    """Weights of a mean loss are 1 / N^2; with the inverse norms of rows of norm 300, 1e-10: less than fp16 holds."""
    image, text = ((size * x / x.norm(dim=1, keepdim=True)).half() for x in pairs(200, 200, 16))
    image.requires_grad_()
    (kind.loss()(image, text, torch.tensor(5.0)) * factor).backward()
    expected = truth(image, text, 5.0)
    error = (image.grad.double() / factor - expected.d_image).norm() / expected.d_image.norm()
    assert error < 2e-3


@pytest.mark.parametrize("kind", FP32_KINDS, ids=str, indirect=True)
def test_extreme_norms_finite_and_accurate(kind: Kind) -> None:
    image, text = pairs(66, 66, 16)
    factor = torch.ones(66, 1)
    factor[3], factor[7], factor[11] = 1e30, 1e20, 1e-6
    image, text = (poisoned(x, kind.dtype) for x in (image * factor, text * factor.flip(0)))
    check(kind.loss(), image, text, 14.3)


@pytest.mark.parametrize("kind", KINDS, ids=str, indirect=True)
def test_zero_rows_finite(kind: Kind) -> None:
    image, text = kind.pairs(20, 20, 8)
    image[3], text[3], text[5] = 0, 0, 0
    a, b, s = image.clone().requires_grad_(), text.clone().requires_grad_(), torch.tensor(14.3, requires_grad=True)
    kind.loss()(a, b, s).backward()
    expected = truth(image, text, 14.3)
    others = torch.arange(20) != 3
    error = (a.grad.double() - expected.d_image)[others].norm() / expected.d_image[others].norm()
    assert error < kind.tolerance(1e-5, 2e-3), "a zero row spoils the others"
    assert s.grad.isfinite()
    if kind.dtype != torch.float16:  # 14.3 / 1e-12 is no float16, as with torch.nn.functional.normalize
        assert a.grad.isfinite().all() and b.grad.isfinite().all()


@pytest.mark.parametrize("kind", WIDE_KINDS, ids=str, indirect=True)
def test_norm_below_the_bound_is_a_constant(kind: Kind) -> None:
    """As in torch.nn.functional.normalize: no projection of the gradient there."""
    image, text = kind.pairs(20, 20, 8)
    image[3] *= 1e-14
    expected = truth(image, text, 14.3).d_image[3]
    image.requires_grad_()
    kind.loss()(image, text, torch.tensor(14.3)).backward()
    assert (image.grad[3].double() - expected).norm() < kind.tolerance(1e-5, 1e-3) * expected.norm()


@pytest.mark.parametrize("kind", KINDS, ids=str, indirect=True)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("place", [0, 129])
def test_nan_and_inf_propagate(kind: Kind, value: float, normalize: bool, place: int) -> None:
    image, text = kind.pairs(130, 130, 8)
    image[place, 2] = value
    image.requires_grad_()
    loss = kind.loss(normalize=normalize)(image, text, torch.tensor(14.3))
    assert not loss.isfinite()
    (gradient,) = torch.autograd.grad(loss, image)
    assert not gradient.isfinite().all()


@pytest.mark.parametrize("kind", KINDS, ids=str, indirect=True)
@pytest.mark.parametrize("D", [6, 12, 100])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("which", [0, 1])
def test_one_side_aligned(kind: Kind, which: int, normalize: bool, D: int) -> None:
    """One side lies as the products want it, the other does not."""
    sides = [x.to(kind.dtype) for x in pairs(9, 9, D)]
    sides[which] = F.pad(sides[which], (0, 16 - D % 8), value=torch.nan)[:, :D]
    sides[1 - which] = torch.cat([torch.zeros(1, dtype=kind.dtype), sides[1 - which].flatten()])[1:].view(9, D)
    expected = truth(*sides, 0.5, normalize=normalize)
    given = [x.detach().requires_grad_() for x in sides]  # a copy would lose the layout
    found = torch.autograd.grad(kind.loss(normalize=normalize)(*given, torch.tensor(0.5)), given)
    for ours, true in zip(found, (expected.d_image, expected.d_text)):
        assert (ours.double() - true).norm() <= kind.tolerance(1e-5, 2e-3) * true.norm()


@pytest.mark.parametrize("kind", FP16_KINDS, ids=str, indirect=True)
def test_rows_beyond_2_to_the_31(kind: Kind) -> None:
    """Element offsets of the last rows do not fit into 32 bits."""
    torch.use_deterministic_algorithms(False)  # the pages between the rows are never touched
    M, stride = 2100, 2**20
    wide = torch.empty(M * stride, dtype=torch.float16, device=DEVICE)
    assert wide.numel() > 2**31
    image, text = wide.as_strided((M, 8), (stride, 1)), torch.randn(3, 8, dtype=torch.float16, device=DEVICE)
    image.copy_(torch.randn(M, 8))
    labels = torch.zeros(M, dtype=torch.int32, device=DEVICE), torch.arange(3, dtype=torch.int32, device=DEVICE)
    p = Problem(image, text, torch.tensor(2.0, device=DEVICE), labels, 0, False, False)
    ours = MODULES[kind.backend].contrastive_fwd(p)
    true = reference.contrastive_fwd(p._replace(image=image.contiguous()))
    for a, b in zip(ours, true):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-5, atol=1e-4)
