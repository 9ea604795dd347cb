"""contrastive_stats and multiview_loss return what the dense formula gives in fp64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastclip
from fastclip._backends.cpu import native
from fastclip.ops.contrastive import by_side
from fastclip.parity.promised import LOSS
from fastclip.parity.truth import direction
from support.accuracy import pairs, poisoned

BACKENDS = ["cpu", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def dense_stats(
    image: Tensor,
    text: Tensor,
    scale: float,
    labels: tuple[Tensor, Tensor] | None = None,
    *,
    normalize: bool = True,
    exclude_self: bool = False,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, ...]:
    """Compute the fields of `ContrastiveStats` in fp64 from the whole matrix of logits."""
    u, v = (F.normalize(x.double(), dim=1) if normalize else x.double() for x in (image, text))
    z = scale * u @ v.T
    left_out = torch.eye(*z.shape, dtype=torch.bool) & exclude_self
    positive = torch.eye(*z.shape, dtype=torch.bool) if labels is None else labels[0][:, None] == labels[1]
    positive &= ~left_out
    sides = []
    for z_side, pos, out in ((z, positive, left_out), (z.T, positive.T, left_out.T)):
        loss = z.new_zeros(len(z_side))
        loss[pos.any(1)] = direction(z_side, pos, label_smoothing, out)
        best = z_side.masked_fill(~pos, -torch.inf).amax(1)
        rival = z_side.masked_fill(pos | out, -torch.inf).amax(1)
        sides.append((z_side.masked_fill(out, -torch.inf).logsumexp(1), loss, best > rival))
    return tuple(x for pair in zip(*sides) for x in pair)


def compare(found: fastclip.ContrastiveStats, expected: tuple[Tensor, ...]) -> None:
    for name, ours, theirs in zip(found._fields, found, expected, strict=True):
        assert not ours.requires_grad
        if ours.dtype == torch.bool:
            assert torch.equal(ours, theirs), name
        else:
            torch.testing.assert_close(ours.double(), theirs, rtol=LOSS, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.pairwise
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 8), (7, 3), (65, 64), (513, 32), (600, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stats_accurate(dtype: torch.dtype, shape: tuple[int, int], backend: str) -> None:
    N, D = shape
    image, text = (poisoned(x, dtype) for x in pairs(N, N, D, noise=1.0))
    found = fastclip.contrastive_stats(image.requires_grad_(), text, 14.3, backend=backend)
    compare(found, dense_stats(image.detach(), text, 14.3))
    if N > 64:
        assert 0.02 < found.row_hit.float().mean() < 0.98, "the case does not tell hits from misses"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"exclude_self": True}, {"normalize": False}], ids=str
)
def test_stats_accurate_with_labels(options: dict[str, object], backend: str) -> None:
    M, N = (90, 90) if "exclude_self" in options else (90, 600)
    image, text = pairs(M, N, 24, noise=1.0)
    generator = torch.Generator().manual_seed(1)
    y = tuple(torch.randint(0, 70, (size,), generator=generator) for size in (M, N))
    given = {"image_labels": y[0], "text_labels": y[1], "backend": backend}
    found = fastclip.contrastive_stats(image, text, 0.7, **given, **options)
    expected = dense_stats(image, text, 0.7, y, **options)
    assert not (expected[2] > 0).all() or not (expected[3] > 0).all(), "every row has a positive"
    compare(found, expected)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_stats_accurate_on_every_instruction_set(isa: str) -> None:
    try:
        native.module.select_isa(isa)
    except ValueError:
        pytest.skip(f"this processor has no {isa}")
    try:
        image, text = pairs(530, 530, 24, noise=1.0)
        compare(fastclip.contrastive_stats(image, text, 20.0), dense_stats(image, text, 20.0))
        y = torch.arange(530) % 200, torch.arange(530) % 190
        found = fastclip.contrastive_stats(image, text, 20.0, image_labels=y[0], text_labels=y[1])
        compare(found, dense_stats(image, text, 20.0, y))
    finally:
        native.module.select_isa("auto")


def test_stats_accurate_in_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", "0.05")
    image, text = pairs(700, 700, 24, noise=1.0)
    compare(fastclip.contrastive_stats(image, text, 20.0), dense_stats(image, text, 20.0))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tie_is_a_miss(dtype: torch.dtype, backend: str, normalize: bool) -> None:
    """A tie counts as a miss: of two equal texts far apart in the batch, rounding does not decide which one wins."""
    image, text = pairs(600, 600, 59, aligned=1.0, noise=0.3)
    text[300:310] = text[:10]
    image, text = image.to(dtype), text.to(dtype)
    found = fastclip.contrastive_stats(image, text, 14.3, backend=backend, normalize=normalize)
    assert not found.row_hit[:10].any()
    assert found.row_hit[10:300].float().mean() > 0.9
    if normalize:
        assert found.col_hit[:10].all() and not found.col_hit[300:310].any()


@pytest.mark.parametrize(("size", "scale"), [(1e18, 4e-38), (1e-25, 1e38)])
def test_ties_of_extreme_norms(size: float, scale: float) -> None:
    """Ties are detected at extreme norms. A norm whose square overflows would make every hit a tie; one whose square
    underflows would make no hit a tie.
    """
    image, text = (size * x for x in pairs(30, 30, 16, aligned=1.0))
    found = fastclip.contrastive_stats(image * 30, text, scale, normalize=False, backend="reference")
    compare(found, dense_stats(image * 30, text, scale, normalize=False))
    assert found.row_hit.float().mean() > 0.9


@pytest.mark.parametrize("backend", BACKENDS)
def test_collapsed_model_has_no_hit(backend: str) -> None:
    x = torch.randn(1, 59).expand(300, 59) * torch.linspace(0.5, 2, 300)[:, None]
    found = fastclip.contrastive_stats(x, x, 100.0, backend=backend)
    assert not found.row_hit.any() and not found.col_hit.any()
    assert not fastclip.contrastive_stats(x, x, 0.0, backend=backend).row_hit.any()
    assert fastclip.contrastive_stats(x[:1], x[:1], 1.0, backend=backend).row_hit.all()  # a single text has no rival


@pytest.mark.parametrize("backend", BACKENDS)
def test_stats_of_rows_that_are_not_finite(backend: str) -> None:
    image, text = pairs(70, 70, 16, aligned=1.0)
    image[3, 2] = torch.nan
    found = fastclip.contrastive_stats(image, text, 14.3, backend=backend)
    assert found.row_loss[3].isnan() and not found.row_hit[3]
    assert found.row_hit[4:].all() and not found.col_hit.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_without_positive(backend: str) -> None:
    image, text = pairs(3, 2, 4)
    y = {"image_labels": torch.tensor([7, 7, 1]), "text_labels": torch.tensor([7, 7])}
    found = fastclip.contrastive_stats(image, text, 2.0, backend=backend, **y)
    assert found.row_loss[2] == 0 and not found.row_hit[2] and found.row_hit[:2].all()
    assert found.row_lse.isfinite().all() and found.col_lse.isfinite().all()


def test_stats_agree_with_the_loss() -> None:
    image, text = pairs(100, 100, 16)
    found = fastclip.contrastive_stats(image, text, label_smoothing=0.1)
    row, col = fastclip.contrastive_loss(image, text, label_smoothing=0.1, reduction="none")
    assert torch.equal(found.row_loss, row) and torch.equal(found.col_loss, col)


def test_stats_use_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    products = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: products.append(1) or real(*args, **kwargs))
    fastclip.contrastive_stats(*pairs(300, 300, 16))
    assert len(products) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("labels", [False, True])
def test_maxima_op_passes_opcheck(backend: str, labels: bool) -> None:
    image, text = pairs(20, 20, 8)
    y = (torch.arange(20, dtype=torch.int32) % 7, torch.arange(20, dtype=torch.int32) % 5) if labels else (None, None)
    torch.library.opcheck(
        torch.ops.fastclip.contrastive_maxima, (image, text, torch.tensor(3.0), *y, 0, False, True, backend, None, None)
    )


@pytest.mark.parametrize("offset", [-3, 0, 5, 100])
@pytest.mark.parametrize("backend", BACKENDS)
def test_offset_moves_the_maxima(offset: int, backend: str) -> None:
    image, text = pairs(20, 30, 8)
    out = torch.ops.fastclip.contrastive_maxima(
        image, text, torch.tensor(2.0), None, None, offset, False, False, backend, None, None
    )
    z = 2.0 * (image.double() @ text.double().T)
    own = torch.arange(20)[:, None] + offset == torch.arange(30)
    expected = [z.masked_fill(~keep, -torch.inf).amax(dim) for keep in (~own, own) for dim in (1, 0)]
    rows, cols = by_side(out)
    for ours, theirs in zip((rows.neg_top, cols.neg_top, rows.pos_top, cols.pos_top), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_stats_compile_whole() -> None:
    image, text = pairs(20, 20, 8)
    compiled = torch.compile(fastclip.contrastive_stats, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(image, text), fastclip.contrastive_stats(image, text)):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_stats_take_what_the_loss_takes() -> None:
    x = torch.randn(4, 8)
    with pytest.raises(ValueError, match="as many texts as images"):
        fastclip.contrastive_stats(x, x[:3])
    with pytest.raises(TypeError, match=r"group must be a torch\.distributed\.ProcessGroup"):
        fastclip.contrastive_stats(x, x, group=object())
    assert fastclip.contrastive_stats(x.double(), x.double()).row_lse.dtype == torch.float64
    assert math.isclose(fastclip.contrastive_stats(x, x, 0.0).row_lse[0], math.log(4), rel_tol=1e-6)
