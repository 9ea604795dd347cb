"""Features compared with themselves without the diagonal: SimCLR, SupCon."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastclip
from fastclip._backends.cpu import native
from fastclip.ops.contrastive import by_side
from fastclip.parity.promised import LOSS
from support.accuracy import check, pairs, poisoned

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def labels_of(N: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    y = torch.randint(0, classes, (N,), generator=torch.Generator().manual_seed(seed))
    return y, y


def without_self(labels: tuple[Tensor, Tensor], backend: str = "cpu", **options: object) -> Callable[..., Tensor]:
    y = {"image_labels": labels[0], "text_labels": labels[1]}
    return lambda i, t, s: fastclip.contrastive_loss(i, t, s, exclude_self=True, backend=backend, **y, **options)


def nt_xent(views: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss (Chen et al. 2020, equation 1) of 2N views; the two views of an image are N apart."""
    N = len(views) // 2
    z = F.normalize(views, dim=1)
    similarity = (z @ z.T / temperature).masked_fill(torch.eye(2 * N, dtype=torch.bool), -torch.inf)
    return F.cross_entropy(similarity, torch.arange(2 * N).roll(N))


def sup_con(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    """SupCon's L_out (Khosla et al. 2020, equation 2), the mean over the anchors that have a positive."""
    z = F.normalize(x, dim=1)
    own = torch.eye(len(x), dtype=torch.bool)
    log_p = (z @ z.T / temperature).masked_fill(own, -torch.inf).log_softmax(1)
    positive = (y[:, None] == y) & ~own
    mean = torch.where(positive, log_p, 0).sum(1) / positive.sum(1).clamp_min(1)
    return -mean[positive.any(1)].mean()


@pytest.mark.parametrize("backend", ["cpu", "reference", None])
def test_simclr_through_labels(backend: str | None) -> None:
    dtype = torch.float64 if backend is None else torch.float32
    first, second = (x.to(dtype) for x in pairs(40, 40, 16))
    y = torch.arange(40).repeat(2)
    options = {"image_labels": y, "text_labels": y, "exclude_self": True, "backend": backend}
    results = []
    for loss in (lambda x: fastclip.contrastive_loss(x, x, 1 / 0.5, **options), lambda x: nt_xent(x.double(), 0.5)):
        x = torch.cat([first, second]).requires_grad_()
        results.append((loss(x), *torch.autograd.grad(loss(x), x)))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=LOSS, atol=1e-8)


def test_sup_con_through_labels() -> None:
    x, _ = pairs(90, 90, 16)
    y, _ = labels_of(90, 25)  # some classes have a single member
    assert (torch.bincount(y) == 1).any()
    results = []
    for loss in (
        lambda x: fastclip.contrastive_loss(x, x, 10.0, image_labels=y, text_labels=y, exclude_self=True),
        lambda x: sup_con(x.double(), y, 0.1),
    ):
        leaf = x.clone().requires_grad_()
        results.append((loss(leaf), *torch.autograd.grad(loss(leaf), leaf)))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=3e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_excluded_pairs_accurate_in_many_blocks(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", "0.05")
    image, text = (poisoned(x, dtype) for x in pairs(700, 700, 24))
    y = labels_of(700, 300)
    check(without_self(y), image, text, 20.0, labels=y, exclude_self=True)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_excluded_pairs_accurate_on_every_instruction_set(isa: str) -> None:
    try:
        native.module.select_isa(isa)
    except ValueError:
        pytest.skip(f"this processor has no {isa}")
    try:
        image, _ = pairs(530, 530, 24)
        y = labels_of(530, 40)
        check(without_self(y), image, image, 100.0, labels=y, exclude_self=True)  # the excluded logits are the largest
        spread = torch.logspace(-1, 1.5, len(image))[:, None]
        x = image * spread / 5
        check(without_self(y, normalize=False), x, x, 3.0, labels=y, exclude_self=True, normalize=False)
    finally:
        native.module.select_isa("auto")


@pytest.mark.parametrize("offset", [-3, 0, 4, 100])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_offset_moves_the_excluded_pairs(offset: int, backend: str) -> None:
    image, text = pairs(20, 30, 8)
    y = torch.arange(20, dtype=torch.int32) % 6, torch.arange(30, dtype=torch.int32) % 6
    out = torch.ops.fastclip.contrastive_fwd(
        image, text, torch.tensor(2.0), *y, offset, True, False, backend, None, None
    )
    z = 2.0 * (image.double() @ text.double().T)
    own = torch.arange(20)[:, None] + offset == torch.arange(30)
    positive, negative = ((y[0][:, None] == y[1]) == same for same in (True, False))
    positive, negative = positive & ~own, negative & ~own
    expected = [z.masked_fill(~negative, -torch.inf).logsumexp(dim) for dim in (1, 0)]
    expected += [(z * positive).sum(dim) for dim in (1, 0)]
    expected += [z.masked_fill(~positive, -torch.inf).logsumexp(dim) for dim in (1, 0)]
    rows, cols = by_side(out)
    stats = rows.neg, cols.neg, rows.pos, cols.pos, rows.pos_lse, cols.pos_lse
    for ours, theirs in zip(stats, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_excluded_pairs_do_not_count(backend: str) -> None:
    """Neither loss nor gradient depends on the excluded pairs. With unit vectors as images, logit (i, j) is component i
    of text j, bit for bit.
    """
    y = labels_of(30, 8)
    results = []
    for own in (0.0, 5.0, -70.0):
        image, text = torch.eye(30).requires_grad_(), torch.randn(30, 30, generator=torch.Generator().manual_seed(0))
        text.diagonal().fill_(own)
        loss = without_self(y, backend, normalize=False)(image, text.requires_grad_(), torch.tensor(1.0))
        (d_text,) = torch.autograd.grad(loss, text)
        assert (d_text.diagonal() == 0).all() and (d_text != 0).any()
        results.append((loss.detach(), d_text))
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0]) and torch.equal(other[1], results[0][1])


def test_excluding_needs_labels_and_as_many_texts() -> None:
    x = torch.randn(4, 8)
    with pytest.raises(ValueError, match="exclude_self needs labels"):
        fastclip.contrastive_loss(x, x, exclude_self=True)
    y = torch.arange(4)
    with pytest.raises(ValueError, match=r"as many texts as images: image_features \(4, 8\).*text_features \(3, 8\)"):
        fastclip.contrastive_loss(x, x[:3], image_labels=y, text_labels=y[:3], exclude_self=True)
    with pytest.raises(ValueError, match="equals a text label of another row: the batch has no positive pair"):
        fastclip.contrastive_loss(x, x, image_labels=y, text_labels=y, exclude_self=True)
    with pytest.raises(ValueError, match="equals a text label of another row"):
        fastclip.contrastive_loss(x[:1], x[:1], image_labels=y[:1], text_labels=y[:1], exclude_self=True)


def test_excluding_compiles_whole() -> None:
    y = torch.arange(10).repeat(2)

    def loss(x: Tensor) -> Tensor:
        return fastclip.contrastive_loss(x, x, 2.0, image_labels=y, text_labels=y, exclude_self=True)

    x = pairs(20, 20, 8)[0].clone().requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (ours,), (theirs,) = torch.autograd.grad(compiled(x), x), torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_excluding_gradcheck_twice() -> None:
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    s = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1, 1, 0, 2, 1])
    for options in ({}, {"label_smoothing": 0.2, "normalize": False}):

        def loss(x: Tensor, s: Tensor, options: dict[str, object] = options) -> Tensor:
            return without_self((y, y), "reference", **options)(x, x, s)

        assert torch.autograd.gradcheck(loss, (x, s))
        assert torch.autograd.gradgradcheck(loss, (x, s))
