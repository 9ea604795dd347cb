"""The launchers of the GPU backends, which users call: offsets, repairs, panels and blocks, work, layouts.

They run on a GPU, or without one in Triton's interpreter and in csrc/tests' emulator of Hopper. What every backend
shares is tested in losses/test_accuracy.py and losses/test_sigmoid_accuracy.py.
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
from fastclip.ops.contrastive import flat
from fastclip.parity.truth import truth
from support.accuracy import check, counted_products, pairs, poisoned, random_labels
from support.kernels import Launches
from support.kinds import DEVICE, GPU, GPU_KINDS, Kind, each_kind, fp16, kept, uneven

MODULES = {"triton": triton, "cuda": cuda}
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("offset", [0, 5, -3, 60, 1000, -1000])
@each_kind(GPU_KINDS, few=True)
def test_offset_of_a_shard(kind: Kind, offset: int) -> None:
    """The positive of row i is column i + offset, if it exists, and all results equal the reference in fp64."""
    image, text = (x.to(kind.dtype) for x in pairs(50, 130, 24))

    def run(dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
        x = [t.to(device, dtype).requires_grad_() for t in (image, text)]
        wide = torch.promote_types(dtype, torch.float32)
        x.append(torch.tensor(9.0, dtype=wide, device=device, requires_grad=True))
        rows, cols = contrastive_statistics(Problem(*x, offset=offset), backend)
        stats = rows.neg, cols.neg, rows.pos, cols.pos
        total = sum((k + 1) * (1e-2 * s[s.isfinite()]).sum() for k, s in enumerate(stats))
        return [t.double().cpu() for t in (*(s.detach() for s in stats), *torch.autograd.grad(total, x))]

    ours, true = run(kind.dtype, DEVICE, kind.backend), run(torch.float64, "cpu", "reference")
    for a, b in zip(ours[:4], true[:4]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(ours[4:], true[4:]):
        assert (a - b).norm() <= kind.tolerance(1e-5, 1e-3) * b.norm()


@each_kind(GPU_KINDS)
def test_repair_of_opposite_features(kind: Kind, launches: Launches) -> None:
    """Opposite features need the repair: normalised at scale 100, every negative cosine is near -1 or 1 / 2,
    below the reach of the offset.
    """
    image = torch.randn(2, 24).repeat_interleave(2, 0)
    image, text = (poisoned(x, kind.dtype) for x in (image + 0.01 * torch.randn(4, 24), -image))
    check(kind.loss(), image[:2], text[:2], 100.0)
    assert launches.repaired[0]


@each_kind(GPU_KINDS)
def test_repair_not_needed_for_ordinary_batches(kind: Kind, launches: Launches) -> None:
    image, text = kind.pairs(130, 130, 64)
    for scale in (10.0, 60.0, 100.0):
        check(kind.loss(), image, text, scale)
    assert launches.repaired == [False] * 6


@pytest.mark.pairwise
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("labels", [False, True], ids=["diagonal", "labels"])
@each_kind(GPU_KINDS)
def test_panels_and_blocks(
    monkeypatch: pytest.MonkeyPatch, launches: Launches, labels: bool, normalize: bool, kind: Kind
) -> None:
    """A workspace of a few tiles forces row panels forward, and row chunks and column blocks backward, also in a
    repair.
    """
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", "0.004")
    M, N = (140, 260) if labels else (260, 260)
    image, text = (poisoned(x, kind.dtype) for x in (pairs(M, N, 24) if normalize else uneven(M, N)))
    y = random_labels(M, N, 60) if labels else None
    check(kind.loss(labels=y, normalize=normalize), image, text, 5.0, labels=y, normalize=normalize)
    if labels or kind.backend != "cuda":  # the plain case of the CUDA backend launches its own kernels
        assert launches.names.count("contrastive_fwd_kernel") > 1
        assert launches.names.count("contrastive_bwd_kernel") == (6 if labels else 9)
    assert launches.repaired == [not normalize] * len(launches.repaired)


@each_kind(GPU_KINDS, few=True)
def test_workspace_bounded(kind: Kind, monkeypatch: pytest.MonkeyPatch, launches: Launches) -> None:
    """Partial sums and weights stay within the workspace for any batch."""
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", "0.125")
    kind.loss(reduction="sum")(*(x.requires_grad_() for x in kind.pairs(400, 400, 8)), torch.tensor(5.0)).backward()
    for name in ("contrastive_fwd_kernel", "contrastive_bwd_kernel"):
        assert launches.tensors(name)
        for tensors in launches.tensors(name):
            sizes = sorted(x.untyped_storage().nbytes() for x in tensors)
            assert sum(sizes[-2:] if "fwd" in name else sizes[-1:]) <= 2**17


@each_kind(GPU_KINDS, few=True)
def test_work_and_launches(kind: Kind, monkeypatch: pytest.MonkeyPatch, launches: Launches) -> None:
    """The forward pass takes 2 M N D operations in five launches including norms, the backward pass 6 M N D in seven
    including products and finish.

    test_plain.py counts the plain case.
    """
    operations = counted_products(monkeypatch)
    M = N = 256
    D = 64
    image, text = (x.to(kind.dtype).requires_grad_() for x in pairs(M, N, D))
    loss = kind.loss(reduction="sum")(image, text, torch.tensor(5.0))
    kernel, reduce = "contrastive_fwd_kernel", "contrastive_fwd_reduce_kernel"
    assert launches.names == [kernel, reduce, f"exact {kernel}", reduce] and operations == []
    loss.backward()
    assert launches.names[4:] == [
        "contrastive_bwd_largest_kernel",
        "contrastive_bwd_vectors_kernel",
        "contrastive_bwd_kernel",
        "exact contrastive_bwd_kernel",
    ]
    assert operations == [2 * M * N * D] * 2


@each_kind(GPU_KINDS, few=True)
def test_every_subset_of_gradients(kind: Kind) -> None:
    image, text = kind.pairs(20, 20, 16)
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


@each_kind(GPU_KINDS, few=True)
def test_bitwise_repeatable(kind: Kind) -> None:
    image, text = kind.pairs(140, 140, 40)

    def run() -> list[Tensor]:
        x = [kept(t).detach().requires_grad_() for t in (image, text)]
        loss = fastclip.contrastive_loss(*x, 20.0, backend=kind.backend)
        return [loss.detach(), *torch.autograd.grad(loss, x)]

    first = run()
    for _ in range(250 if GPU else 2):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


@each_kind(GPU_KINDS)
def test_swapped_modalities_swap_gradients(kind: Kind) -> None:
    image, text = (kept(x).detach().requires_grad_() for x in kind.pairs(130, 130, 24))
    a = torch.autograd.grad(fastclip.contrastive_loss(image, text, 14.0, backend=kind.backend), (image, text))
    b = torch.autograd.grad(fastclip.contrastive_loss(text, image, 14.0, backend=kind.backend), (image, text))
    for x, y in zip(a, b):
        assert (x - y).double().norm() <= kind.tolerance(1e-6, 2e-3) * x.double().norm()


@pytest.mark.pairwise
@pytest.mark.parametrize("D", [6, 12, 100])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("which", [0, 1])
@each_kind(GPU_KINDS)
def test_one_side_aligned(kind: Kind, which: int, normalize: bool, D: int) -> None:
    """Features may be aligned as the products need them on one side only."""
    sides = [x.to(kind.dtype) for x in pairs(9, 9, D)]
    sides[which] = F.pad(sides[which], (0, 16 - D % 8), value=torch.nan)[:, :D]
    sides[1 - which] = torch.cat([torch.zeros(1, dtype=kind.dtype), sides[1 - which].flatten()])[1:].view(9, D)
    expected = truth(*sides, 0.5, normalize=normalize)
    given = [x.detach().requires_grad_() for x in sides]  # a copy would lose the layout
    found = torch.autograd.grad(kind.loss(normalize=normalize)(*given, torch.tensor(0.5)), given)
    for ours, true in zip(found, (expected.d_image, expected.d_text)):
        assert (ours.double() - true).norm() <= kind.tolerance(1e-5, 2e-3) * true.norm()


@each_kind(fp16(GPU_KINDS))
def test_rows_beyond_2_to_the_31(kind: Kind) -> None:
    """Rows whose element offsets do not fit into 32 bits are read correctly."""
    torch.use_deterministic_algorithms(False)  # otherwise torch would fill the pages between the rows
    M, stride = 2100, 2**20
    wide = torch.empty(M * stride, dtype=torch.float16, device=DEVICE)
    assert wide.numel() > 2**31
    image, text = wide.as_strided((M, 8), (stride, 1)), torch.randn(3, 8, dtype=torch.float16, device=DEVICE)
    image.copy_(torch.randn(M, 8))
    labels = torch.zeros(M, dtype=torch.int32, device=DEVICE), torch.arange(3, dtype=torch.int32, device=DEVICE)
    p = Problem(image, text, torch.tensor(2.0, device=DEVICE), labels, 0, False, False)
    ours = MODULES[kind.backend].contrastive_fwd(p)
    true = reference.contrastive_fwd(p._replace(image=image.contiguous()))
    for a, b in zip(flat(ours), flat(true)):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-5, atol=1e-4)


@each_kind(GPU_KINDS, few=True)
def test_sigmoid_without_gradients_multiplies_once(
    kind: Kind, monkeypatch: pytest.MonkeyPatch, launches: Launches
) -> None:
    operations = counted_products(monkeypatch)
    image, text = kind.pairs(128, 128, 32)
    kind.loss()(image, text, torch.tensor(10.0), torch.tensor(-10.0))
    assert launches.names.count("sigmoid_fwd_kernel") == 1 and operations == []
    kind.loss()(image.requires_grad_(), text.requires_grad_(), torch.tensor(10.0), torch.tensor(-10.0))
    assert operations == [2 * 128 * 128 * 32] * 2


@each_kind(GPU_KINDS)
def test_sigmoid_blocks(kind: Kind, monkeypatch: pytest.MonkeyPatch, launches: Launches) -> None:
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", "0.04")
    image, text = kind.pairs(200, 200, 24)
    check(kind.loss(), image, text, 10.0, bias=-10.0)
    image, text = (poisoned(x, kind.dtype) for x in uneven(200, 200))
    check(kind.loss(normalize=False), image, text, 0.05, bias=-4.0, normalize=False)
    assert launches.names.count("sigmoid_fwd_kernel") == 2 * 4  # two halves of the rows and of the columns
