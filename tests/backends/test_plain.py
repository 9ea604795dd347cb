"""The plain case of the GPU backends: N pairs, the mean loss and its gradients, in one call forward and one backward.

The tests call the backends directly instead of the ops. test_kernels.py tests the general case, which
shares the tiles of the statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from fastclip.triton_kernels import plain, planning
from fastclip.triton_kernels.tile import REPAIR
from torch import Tensor

from fastclip._backends import cuda, triton
from fastclip.parity.promised import LOSS
from fastclip.parity.truth import truth
from fastclip.system import env
from support.accuracy import check, counted_products, pairs, poisoned
from support.kernels import Launches
from support.kinds import DEVICE, GPU_KINDS, LAYOUTS, SHAPES, Kind, each_kind, fp16, kept, laid_out, uneven, wide

MODULES: dict[str, ModuleType] = {"triton": triton, "cuda": cuda}
_REPAIR = REPAIR.value  # csrc/fastclip.h has the same value
PLAIN = [kind for kind in GPU_KINDS if hasattr(MODULES[kind.backend], "plain_fwd")]
TRITON = [kind for kind in PLAIN if kind.backend == "triton"]
CUDA = [kind for kind in PLAIN if kind.backend == "cuda"]
pytestmark = pytest.mark.usefixtures("poisoned_memory")


class _Loss(torch.autograd.Function):
    """Smallest autograd function that calls both passes."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, kind: Kind, weight: float, normalize: bool
    ) -> Tensor:
        loss, saved = MODULES[kind.backend].plain_fwd(image, text, scale, weight, normalize)
        assert saved.shape == (MODULES[kind.backend].plain_saved(len(image)),) and saved.dtype == torch.float32
        ctx.save_for_backward(image, text, scale, saved)
        ctx.options = kind, weight, normalize
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        kind, weight, normalize = ctx.options
        *inputs, saved = ctx.saved_tensors
        before = saved.clone()
        options = weight, normalize, upstream, ctx.needs_input_grad[:3]
        found = MODULES[kind.backend].plain_bwd(*inputs, saved, *options)
        assert torch.equal(before.view(torch.int32), saved.view(torch.int32)), "a second backward finds it changed"
        return *found, None, None, None


def plain_loss(kind: Kind, *, image_weight: float = 0.5, normalize: bool = True) -> Callable[..., Tensor]:
    """Return a loss that takes and returns tensors on the CPU, where the truth is computed."""

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        inputs = *(kept(x, kind.device) for x in (image, text)), scale.to(kind.device)
        return _Loss.apply(*inputs, kind, image_weight, normalize).to("cpu")

    return loss


def check_repaired(kind: Kind, expected: bool, image: Tensor, text: Tensor, scale: float, normalize: bool) -> None:
    """Check whether a repair ran, from the constants at the head of `saved`, which both backends share."""
    inputs = *(kept(x, kind.device) for x in (image, text)), torch.tensor(scale, device=kind.device)
    _, saved = MODULES[kind.backend].plain_fwd(*inputs, 0.5, normalize)
    assert bool(saved[_REPAIR] != 0) == expected


def features(kind: Kind, N: int, D: int, **options: Any) -> list[Tensor]:
    """Return features on the device that require gradients."""
    return [kept(x, kind.device).detach().requires_grad_() for x in kind.pairs(N, N, D, **options)]


@pytest.mark.pairwise
@pytest.mark.parametrize("scale", [14.3, 100.0, 1.0, -5.0, 0.0])
@pytest.mark.parametrize("weight", [0.5, 0.3, 0.0, 1.0])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("regime", SHAPES)
@each_kind(PLAIN)
def test_loss_and_gradients_accurate(kind: Kind, regime: str, normalize: bool, weight: float, scale: float) -> None:
    N, _, D = kind.shape(regime)
    image, text = kind.pairs(N, N, D)
    if not normalize:
        image, text = (poisoned(x / D**0.5) for x in (image, text))
    options = {"image_weight": weight, "normalize": normalize}
    check(plain_loss(kind, **options), image, text, scale, **options)


@pytest.mark.parametrize(("noise", "loss"), [(0.12, 1e-9), (0.06, 1e-20)])
@each_kind(PLAIN)
def test_solved_batch_keeps_digits(kind: Kind, noise: float, loss: float) -> None:
    image, text = kind.pairs(150, 150, 256, aligned=1.0, noise=noise)
    scale = 28.0 if loss > 1e-12 else 66.0
    found = check(plain_loss(kind), image, text, scale, base_line=False)
    assert loss / 1e4 < float(found.loss) < loss * 1e1, "the case no longer tests what its name says"


@each_kind(PLAIN)
def test_blocks_of_solved_and_unsolved_pairs(kind: Kind) -> None:
    """Each 128 pairs have their own power of two until all are known; here these powers differ by 2^40."""
    image, text = kind.pairs(300, 300, 64, aligned=1.0, noise=0.02)
    text[140:260] = text[140:260].flip(0)
    check(plain_loss(kind), image, text, 50.0)


@pytest.mark.pairwise
@pytest.mark.parametrize("scale", [1.0, 5.0, -3.0])
@pytest.mark.parametrize("N", [2, 64, 200, 260])
@each_kind(PLAIN)
def test_repair_of_uneven_norms(kind: Kind, N: int, scale: float) -> None:
    """Uneven norms put the logits of a tile thousands apart, so that one offset cannot serve them. The sizes have
    one block of indices, or several.
    """
    image, text = (poisoned(x, kind.dtype) for x in uneven(N, N))
    check(plain_loss(kind, normalize=False, image_weight=0.3), image, text, scale, normalize=False, image_weight=0.3)
    check_repaired(kind, True, image, text, scale, normalize=False)


@each_kind(PLAIN)
def test_repair_of_opposite_features(kind: Kind) -> None:
    """Opposite features need the repair: normalised at scale 100, every negative cosine is near -1 or 1 / 2,
    below the reach of the offset.
    """
    image = torch.randn(2, 24).repeat_interleave(2, 0)
    image, text = (poisoned(x, kind.dtype) for x in (image + 0.01 * torch.randn(4, 24), -image))
    check(plain_loss(kind), image[:2], text[:2], 100.0)
    check_repaired(kind, True, image[:2], text[:2], 100.0, normalize=True)


@each_kind(PLAIN)
def test_repair_not_needed_for_ordinary_batches(kind: Kind) -> None:
    for scale in (0.0, 10.0, 60.0, 100.0):
        check_repaired(kind, False, *kind.pairs(130, 130, 64), scale, normalize=True)


@pytest.mark.pairwise
@pytest.mark.parametrize(("normalize", "workspace"), [(True, "0.004"), (False, "0.004"), (False, "0.125")])
@pytest.mark.parametrize("N", [260, 400])
@each_kind(PLAIN)
def test_panels_and_blocks(
    kind: Kind, normalize: bool, N: int, workspace: str, monkeypatch: pytest.MonkeyPatch, launches: Launches
) -> None:
    """A workspace of a few tiles forces row panels forward, and row chunks and column blocks backward, also in a
    repair.
    """
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", workspace)
    image, text = (poisoned(x, kind.dtype) for x in (pairs(N, N, 24) if normalize else uneven(N, N)))
    check(plain_loss(kind, normalize=normalize), image, text, 5.0, normalize=normalize)
    if kind.backend == "triton":
        assert launches.names.count("contrastive_fwd_kernel") > (workspace == "0.004")
        assert launches.names.count("contrastive_bwd_kernel") > 1
    else:
        assert cuda._sizes(N, 24, env.workspace_bytes("cuda"), cuda._processors(-1))[-1] < N
    check_repaired(kind, not normalize, image, text, 5.0, normalize)  # a repair would hide a forgotten panel


@each_kind(CUDA)
def test_chunks_of_whole_rows(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace that fits a wave of rows gives chunks of whole rows, here with two processors and products two tiles
    wide.
    """
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", "0.125")
    monkeypatch.setattr(cuda, "_processors", lambda device: 2)
    _, _, _, chunks, *_, columns = cuda._sizes(300, 264, env.workspace_bytes("cuda"), 2)
    assert chunks > 1 and columns == 300
    check(plain_loss(kind), *kind.pairs(300, 300, 264), 5.0)


@each_kind(TRITON, few=True)
def test_workspace_bounded(kind: Kind, monkeypatch: pytest.MonkeyPatch, launches: Launches) -> None:
    """Partial sums and weights stay within the workspace for any batch; other memory grows only with N and N D."""
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", "0.125")
    N, D = 400, 8
    plain_loss(kind)(*(x.requires_grad_() for x in kind.pairs(N, N, D)), torch.tensor(5.0)).backward()
    for name in ("contrastive_fwd_kernel", "contrastive_bwd_kernel"):
        for tensors in launches.tensors(name):
            largest = max(x.untyped_storage().nbytes() for x in tensors)
            assert largest <= 2**17 + (64 * N if "fwd" in name else 3 * 4 * N * D)


@each_kind(PLAIN)
def test_one_pair(kind: Kind) -> None:
    """A single pair has no negatives: loss and gradients are 0."""
    x = features(kind, 1, 8)
    scale = torch.tensor(14.3, device=DEVICE, requires_grad=True)
    loss = _Loss.apply(*x, scale, kind, 0.5, True)
    assert float(loss.detach()) == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(loss, (*x, scale)))


@each_kind(PLAIN)
def test_zero_rows_finite(kind: Kind) -> None:
    image, text = kind.pairs(20, 20, 8)
    image[3], text[3], text[5] = 0, 0, 0
    a, b, s = image.clone().requires_grad_(), text.clone().requires_grad_(), torch.tensor(14.3, requires_grad=True)
    loss = plain_loss(kind)(a, b, s)
    loss.backward()
    expected = truth(image, text, 14.3)
    assert abs(float(loss.detach()) / float(expected.loss) - 1) < LOSS
    others = torch.arange(20) != 3
    error = (a.grad.double() - expected.d_image)[others].norm() / expected.d_image[others].norm()
    assert error < kind.tolerance(1e-5, 2e-3)
    assert s.grad.isfinite()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("place", [0, 129])
@each_kind(PLAIN, few=True)
def test_nan_and_inf_propagate(kind: Kind, value: float, normalize: bool, place: int) -> None:
    image, text = kind.pairs(130, 130, 8)
    image[place, 2] = value
    image.requires_grad_()
    loss = plain_loss(kind, normalize=normalize)(image, text, torch.tensor(14.3))
    assert not loss.isfinite()
    (gradient,) = torch.autograd.grad(loss, image)
    assert not gradient.isfinite().all()


@pytest.mark.parametrize("scale", [torch.nan, torch.inf])
@each_kind(PLAIN, few=True)
def test_scale_that_is_not_finite_propagates(kind: Kind, scale: float) -> None:
    inputs = *features(kind, 20, 16), torch.tensor(scale, device=DEVICE, requires_grad=True)
    loss = _Loss.apply(*inputs, kind, 0.5, True)
    assert not any(x.isfinite().any() for x in (loss, *torch.autograd.grad(loss, inputs)))


@pytest.mark.parametrize(
    ("factor", "size"), [(-3.0, 1.0), (65536.0, 1.0), (1e25, 1.0), (1e-30, 1.0), (2.0**-126, 1e-6)]
)
@each_kind(wide(PLAIN))
def test_upstream_gradient_scales(kind: Kind, factor: float, size: float) -> None:
    """Upstream gradients scale the result without overflow or flushing, from a scaler's factor to the subnormal weights
    of a mean over very many pairs.
    """
    image, text = (size * x for x in kind.pairs(30, 30, 16))
    expected = truth(image, text, 14.3)
    image.requires_grad_()
    plain_loss(kind)(image, text, torch.tensor(14.3)).backward(torch.tensor(factor))
    error = (image.grad.double() / factor - expected.d_image).norm() / expected.d_image.norm()
    assert error < kind.tolerance(3e-6, 2e-3)


@pytest.mark.parametrize(("size", "factor"), [(1.0, 2.0**16), (300.0, 2.0**16), (2.0**-8, 2.0**-10)])
@each_kind(fp16(PLAIN))
def test_fp16_gradients_do_not_flush(kind: Kind, size: float, factor: float) -> None:
    """Gradients in fp16 do not flush to zero, because a scaler's factor is multiplied in before the only cast."""
    image, text = ((size * x / x.norm(dim=1, keepdim=True)).half() for x in pairs(200, 200, 16))
    image.requires_grad_()
    plain_loss(kind)(image, text, torch.tensor(5.0)).backward(torch.tensor(factor))
    expected = truth(image, text, 5.0)
    error = (image.grad.double() / factor - expected.d_image).norm() / expected.d_image.norm()
    assert error < 2e-3


@each_kind(PLAIN, few=True)
def test_upstream_nan_and_zero(kind: Kind) -> None:
    x = features(kind, 40, 16)
    inputs = *x, torch.tensor(14.3, device=DEVICE, requires_grad=True)
    loss = _Loss.apply(*inputs, kind, 0.5, True)
    for upstream, expected in ((torch.nan, "all NaN"), (0.0, "all 0"), (torch.inf, "no number")):
        for gradient in torch.autograd.grad(loss, inputs, torch.tensor(upstream, device=DEVICE), retain_graph=True):
            if expected == "all NaN":
                assert gradient.isnan().all()
            elif expected == "all 0":
                assert not gradient.any()
            else:
                assert not gradient.isfinite().any()


@pytest.mark.parametrize("normalize", [True, False])
@each_kind(PLAIN, few=True)
def test_bitwise_repeatable_and_backward_twice(kind: Kind, normalize: bool) -> None:
    x = features(kind, 140, 40)
    inputs = *x, torch.tensor(9.0, device=DEVICE, requires_grad=True)

    def run() -> list[Tensor]:
        loss = _Loss.apply(*inputs, kind, 0.5, normalize)
        once, twice = (torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(once, twice))
        return [loss.detach(), *once]

    first = run()
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


@pytest.mark.parametrize("repair", [False, True])
@each_kind(TRITON, few=True)
def test_loss_by_ticket_or_by_another_launch(kind: Kind, repair: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An additional launch adds what the last program would add, on devices whose barrier does not order global memory
    (AMD). Both ways give the same bits.
    """
    image, text = (x.detach().requires_grad_() for x in (uneven(300, 300) if repair else pairs(300, 300, 16)))
    text.data[140:260] = text.data[140:260].flip(0)
    image, text = (kept(x.detach().to(kind.dtype)).requires_grad_() for x in (image, text))
    inputs = image, text, torch.tensor(9.0, device=DEVICE, requires_grad=True)
    found = []
    for ticket in (True, False):
        monkeypatch.setattr(plain, "_TICKET", ticket)
        monkeypatch.setattr(planning, "plans", {})
        loss = _Loss.apply(*inputs, kind, 0.5, not repair)
        found.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*found))


@each_kind(PLAIN, few=True)
def test_every_subset_of_gradients(kind: Kind) -> None:
    inputs = [*features(kind, 20, 16), torch.tensor(9.0, device=DEVICE, requires_grad=True)]
    expected = torch.autograd.grad(_Loss.apply(*inputs, kind, 0.5, True), inputs)
    for subset in range(1, 8):
        given = [x.detach().clone().requires_grad_(bool(subset >> k & 1)) for k, x in enumerate(inputs)]
        _Loss.apply(*given, kind, 0.5, True).backward()
        for k, x in enumerate(given):
            assert (x.grad is not None) == bool(subset >> k & 1)
            if x.grad is not None:
                torch.testing.assert_close(x.grad, expected[k], rtol=0, atol=0)


@pytest.mark.pairwise
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("D", [2, 24, 30])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("normalize", [True, False])
@each_kind(PLAIN, few=True)
def test_layouts(kind: Kind, normalize: bool, side: int, D: int, layout: str) -> None:
    sides = [x.clone() for x in kind.pairs(40, 40, D)]
    sides[side] = laid_out(sides[side], layout)
    image, text = (x.to(DEVICE).detach().requires_grad_() for x in sides)
    loss = _Loss.apply(image, text, torch.tensor(3.0, device=DEVICE), kind, 0.5, normalize)
    expected = truth(image.detach().cpu(), text.detach().cpu(), 3.0, normalize=normalize)
    assert abs(float(loss.detach()) - float(expected.loss)) <= 2 * LOSS * float(expected.loss)
    for ours, true in zip(torch.autograd.grad(loss, (image, text)), (expected.d_image, expected.d_text)):
        assert ours.is_contiguous()
        assert (ours.cpu().double() - true).norm() <= kind.tolerance(3e-5, 2e-3) * true.norm()


@each_kind(TRITON)
def test_work_and_launches(kind: Kind, monkeypatch: pytest.MonkeyPatch, launches: Launches) -> None:
    """The forward pass takes 2 M N D operations in five launches, the backward pass 6 M N D in three launches and two
    products. That makes ten if nothing is copied.
    """
    operations = counted_products(monkeypatch)
    N, D = 256, 64
    inputs = [*features(kind, N, D), torch.tensor(5.0, device=DEVICE, requires_grad=True)]
    copy = [] if kind.dtype == torch.bfloat16 else ["copy_sides_kernel"]
    loss = _Loss.apply(*inputs, kind, 0.5, True)
    tiles, reduce = "contrastive_fwd_kernel", "plain_reduce_kernel"
    forward = ["plain_norms_kernel", *copy, tiles, reduce, f"exact {tiles}", reduce]
    assert launches.names == forward and operations == []
    loss.backward()
    backward = [*copy, "contrastive_bwd_kernel", "exact contrastive_bwd_kernel", "plain_finish_kernel"]
    assert launches.names[len(forward) :] == backward
    assert operations == [2 * N * N * D] * 2
