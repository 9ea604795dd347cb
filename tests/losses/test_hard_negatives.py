"""hardest_negatives against a dense fp64 computation and a peer: values, ties, labels, memory, several processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import fastclip
from fastclip.losses import hard_negatives
from fastclip.losses.largest import largest
from support.accuracy import counted_products, pairs, poisoned, random_labels
from support.processes import ended, forked, forks, join_group
from support.rounding import RoundsByPlace

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPTIONS: dict[str, dict[str, Any]] = {
    "pairs": {},
    "not normalised": {"normalize": False},
    "labels": {"labels": True},
    "self": {"labels": True, "exclude_self": True},
}


def similarities(
    image: Tensor,
    text: Tensor,
    y: tuple[Tensor, Tensor] | None = None,
    *,
    normalize: bool = True,
    exclude_self: bool = False,
) -> Tensor:
    """Return all similarities in fp64, -inf at the pairs that are not negatives."""
    u, v = (F.normalize(x.double(), dim=1) if normalize else x.double() for x in (image, text))
    z = u @ v.T
    positive = torch.eye(*z.shape, dtype=torch.bool) if y is None else y[0][:, None] == y[1]
    return z.masked_fill(positive | (torch.eye(*z.shape, dtype=torch.bool) & exclude_self), -torch.inf)


def compare(found: fastclip.HardestNegatives, z: Tensor, k: int) -> None:
    """Compare with the largest entries of z; indices where no other value is within rounding."""
    size = float(z[z.isfinite()].abs().max())
    assert found.values.shape == found.indices.shape == (len(z), k) and found.indices.dtype == torch.int64
    values, indices = z.sort(dim=1, descending=True, stable=True)
    kept = min(k, z.shape[1])
    expected = F.pad(values[:, :kept], (0, k - kept), value=-torch.inf)
    torch.testing.assert_close(found.values.double(), expected, rtol=0, atol=1e-6 * size)
    some = expected.isfinite()
    assert (found.indices[~some] == -1).all()
    there = z.gather(1, found.indices.clamp_min(0))
    torch.testing.assert_close(there[some], expected[some], rtol=0, atol=2e-6 * size)
    gap = F.pad(values, (1, 1), value=torch.inf).diff(dim=1).abs() > 3e-6 * size
    distinct = (gap[:, :-1] & gap[:, 1:])[:, :kept] & some[:, :kept]
    assert distinct.float().mean() > 0.4 or size == 0
    assert torch.equal(found.indices[:, :kept][distinct], indices[:, :kept][distinct])


@pytest.mark.pairwise
@pytest.mark.parametrize("workspace", [None, "0.001", "0.05"])
@pytest.mark.parametrize("k", [1, 4, 100, 150])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hardest_negatives_accurate(
    dtype: torch.dtype, options: str, k: int, workspace: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values are within 1e-6 of fp64, and indices are exact, with blocks of 5 x 5 and of 50 x 50 similarities, too."""
    if workspace is not None:
        monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", workspace)
    given = dict(OPTIONS[options])
    M, N = (100, 140) if options == "labels" else (140, 140)
    image, text = (poisoned(x, dtype) for x in pairs(M, N, 24, noise=1.0))
    y = random_labels(M, N, 30) if given.pop("labels", False) else None
    labels = {} if y is None else {"image_labels": y[0], "text_labels": y[1]}
    found = fastclip.hardest_negatives(image.requires_grad_(), text, k, **labels, **given)
    assert found.values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not found.values.requires_grad
    compare(found, similarities(image.detach(), text, y, **given), k)


@pytest.mark.parametrize("normalize", [True, False])
def test_products_of_16_bit_features_as_on_a_gpu(normalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that a GPU sums in fp32, emulated here, are scaled by the norms afterwards."""
    image, text = (x.bfloat16() for x in pairs(90, 90, 24, noise=1.0))
    products, real = [], torch.mm

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
        products.append(a.dtype)
        return real(a.to(out_dtype), b.to(out_dtype))

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(hard_negatives, "_sums_in_fp32", lambda x: True)
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", "0.05")
    found = fastclip.hardest_negatives(image, text, 4, normalize=normalize)
    compare(found, similarities(image, text, normalize=normalize), 4)
    assert set(products) == {torch.bfloat16} and len(products) > 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hardest_negatives_accurate_on_a_gpu(dtype: torch.dtype) -> None:
    image, text = (x.to(dtype) for x in pairs(700, 700, 64, noise=1.0))
    found = fastclip.hardest_negatives(image.cuda(), text.cuda(), 9)
    compare(fastclip.HardestNegatives(*(x.cpu() for x in found)), similarities(image, text), 9)


def best_first(row: list[float]) -> list[int]:
    """Return the indices of finite values: the best and all within 2^-20 of it by index, then the best of the rest."""
    order, left = [], [j for j, value in enumerate(row) if value > -torch.inf]
    while left:
        best = max(row[j] for j in left)
        equal = [j for j in left if row[j] >= best - 2.0**-20]
        order, left = order + equal, [j for j in left if j not in equal]
    return order


@pytest.mark.parametrize("processor", [nullcontext, RoundsByPlace])
@pytest.mark.parametrize("workspace", ["0.001", "0.01", "1"])
def test_equal_texts_are_ordered_by_index(
    workspace: str, processor: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts that repeat, a few times or many, keep their order across blocks of any size, whatever rounding makes of
    their products.
    """
    image, text = pairs(60, 60, 16)
    text[5::7] = text[5]  # 8 equal texts, and 20 others
    text[4::3] = text[4]
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", workspace)
    z = similarities(image, text)
    expected = [best_first(row) for row in z.tolist()]
    for k in (1, 3, 12, 30, 59):
        with processor():
            found = fastclip.hardest_negatives(image, text, k)
        assert found.indices.tolist() == [row[:k] for row in expected]
        assert (found.values.diff(dim=1) <= 0).all()


def test_ties_of_unnormalised_features() -> None:
    """The margin of a tie follows the norms, and a text that is not finite does not make all others equal."""
    image, text = (1e3 * x for x in pairs(40, 40, 16))
    text[30] = text[6]
    with RoundsByPlace():
        found = fastclip.hardest_negatives(image, text, 39, normalize=False)
    places = found.indices.argsort(dim=1)  # the place of each text; an image lacks its own
    for i in range(40):
        if i not in (6, 30):
            own = int(i < 6), int(i < 30)
            assert places[i, 30 - own[1]] == places[i, 6 - own[0]] + 1
    image[:, 2] = image[:, 2].abs()
    z = similarities(image, text.where(torch.arange(40)[:, None] != 3, 0.0), normalize=False)
    for bad in (torch.nan, torch.inf):
        text[3, 2] = bad
        found = fastclip.hardest_negatives(image, text, 5, normalize=False)
        assert (found.indices[4:, 0] == 3).all() and not found.values[4:, 0].isfinite().any()
        compare(fastclip.HardestNegatives(*(x[4:30, 1:] for x in found)), z[4:30], 4)


def test_work_is_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    operations = counted_products(monkeypatch)
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", "0.1")
    image, text = pairs(300, 300, 16)
    fastclip.hardest_negatives(image, text, 5)
    assert sum(operations) == 2 * 300 * 300 * 16 and len(operations) > 9


def test_rows_that_are_not_finite() -> None:
    """A row of NaN has NaN values and the first texts that are not its positives; all other rows keep their results."""
    image, text = pairs(30, 30, 8)
    before = fastclip.hardest_negatives(image, text, 3)
    image[2, 5], image[7] = torch.nan, torch.inf
    found = fastclip.hardest_negatives(image, text, 3)
    assert found.values[[2, 7]].isnan().all()
    assert found.indices[[2, 7]].tolist() == [[0, 1, 3], [0, 1, 2]]
    others = [i for i in range(30) if i not in (2, 7)]
    assert torch.equal(found.values[others], before.values[others])
    assert torch.equal(found.indices[others], before.indices[others])
    text[4, 0] = torch.nan
    found = fastclip.hardest_negatives(image, text, 2)
    others = [i for i in others if i != 4 and before.indices[i, 0] != 4]
    assert found.values[others, 0].isnan().all() and (found.indices[others, 0] == 4).all()
    assert torch.equal(found.values[others, 1], before.values[others, 0])


def test_missing_negatives_are_filled() -> None:
    image, text = pairs(3, 4, 8)
    y = {"image_labels": torch.tensor([0, 1, 2]), "text_labels": torch.tensor([0, 0, 0, 1])}
    found = fastclip.hardest_negatives(image, text, 6, **y)
    assert (found.indices >= 0).sum(1).tolist() == [1, 3, 4]
    assert torch.equal(found.indices == -1, found.values == -torch.inf)
    assert found.indices[0].tolist() == [3, -1, -1, -1, -1, -1]
    alone = fastclip.hardest_negatives(image[:1], text[:1], 2)
    assert alone.indices.tolist() == [[-1, -1]]


def test_missing_negatives_take_no_second_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images with fewer than k negatives among many positives take one product."""
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", "0.1")
    image, text = pairs(200, 200, 16)
    y = torch.arange(200).clamp_min(189)  # the first 190 images have 10 negatives
    operations = counted_products(monkeypatch)
    found = fastclip.hardest_negatives(image, text, 12, image_labels=y, text_labels=y)
    assert sum(operations) == 2 * 200 * 200 * 16 and len(operations) > 9
    compare(found, similarities(image, text, (y, y)), 12)
    assert (found.indices >= 0).sum(1).tolist() == [10] * 190 + [12] * 10


def test_items_of_minus_infinity_that_are_not_masked_are_ordered() -> None:
    """Search puts items that are not finite last. They are equal items, in the order of their indices."""
    blocks = [slice(0, 20), slice(20, 40)]
    found = largest(lambda block: torch.full((2, 20), -torch.inf), blocks, 9)
    assert found.indices.tolist() == [list(range(9))] * 2


def test_a_batch_without_positives_is_mined() -> None:
    image, text = pairs(5, 9, 8)
    found = fastclip.hardest_negatives(
        image, text, 2, image_labels=torch.zeros(5).int(), text_labels=torch.ones(9).int()
    )
    expected = similarities(image, text, (torch.zeros(5), torch.ones(9))).topk(2)
    assert torch.equal(found.indices, expected.indices)


@pytest.mark.parametrize("exclude_self", [False, True])
def test_ignored_rows_are_left_out(exclude_self: bool) -> None:
    """The remaining rows have the result of a batch without the ignored ones, with indices of the whole batch."""
    image, text = pairs(40, 40, 12)
    y = random_labels(40, 40, 9)
    y = (y[0] - 1, y[0] - 1) if exclude_self else (y[0] - 1, y[1] - 1)
    rows, columns = (x != -1 for x in y)
    assert 0 < rows.sum() < 40
    options = {"exclude_self": exclude_self}
    found = fastclip.hardest_negatives(image, text, 3, image_labels=y[0], text_labels=y[1], ignore_label=-1, **options)
    one = fastclip.hardest_negatives(
        image[rows], text[columns], 3, image_labels=y[0][rows], text_labels=y[1][columns], **options
    )
    assert torch.equal(found.values[rows], one.values)
    assert torch.equal(found.indices[rows], columns.nonzero().squeeze(1)[one.indices])
    assert (found.values[~rows] == -torch.inf).all() and (found.indices[~rows] == -1).all()


def test_agrees_with_sentence_transformers() -> None:
    util = pytest.importorskip("sentence_transformers.util", reason="sentence-transformers is not installed")
    image, text = pairs(60, 500, 32, noise=1.0)
    y = {"image_labels": torch.arange(60), "text_labels": torch.arange(500)}
    found = fastclip.hardest_negatives(image, text, 10, **y)
    for i, hits in enumerate(util.semantic_search(image, text, top_k=11)):
        hits = [hit for hit in hits if hit["corpus_id"] != i][:10]
        assert found.indices[i].tolist() == [hit["corpus_id"] for hit in hits]
        assert found.values[i].tolist() == pytest.approx([hit["score"] for hit in hits], abs=1e-6)


def test_memory_is_that_of_a_workspace() -> None:
    """All similarities would take 1 GiB; the largest ones are found in 64 MiB and some room."""
    code = """
import resource, torch, fastclip
torch.set_num_threads(1)
x, y = torch.randn(2, 16_384, 8)
labels = torch.randint(5000, (16_384,))
fastclip.hardest_negatives(x[:500], y[:500], 10, image_labels=labels[:500], text_labels=labels[:500])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = fastclip.hardest_negatives(x, y, 10, image_labels=labels, text_labels=labels)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, int(found.indices.min()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, least = map(float, done.stdout.split())
    assert grown < 100 and least >= 0  # MiB


def test_autocast_rounds_the_features_only() -> None:
    image, text = pairs(20, 20, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = fastclip.hardest_negatives(image, text, 3)
    expected = fastclip.hardest_negatives(image.bfloat16(), text.bfloat16(), 3)
    assert torch.equal(found.values, expected.values) and torch.equal(found.indices, expected.indices)


def test_compiled_code_may_call_it() -> None:
    image, text = pairs(20, 20, 8)
    torch._dynamo.reset()
    found = torch.compile(fastclip.hardest_negatives, backend="eager")(image, text, 3)
    expected = fastclip.hardest_negatives(image, text, 3)
    assert torch.equal(found.indices, expected.indices)


X = torch.randn(4, 8)
ERRORS = {
    "a bool": ((X, X, True), {}, TypeError, "k must be a positive integer, got bool"),
    "a float": ((X, X, 2.0), {}, TypeError, "k must be a positive integer, got float"),
    "zero": ((X, X, 0), {}, ValueError, "k must be at least 1, got 0"),
    "rows": ((X, X[:3], 1), {}, ValueError, r"as many texts as images: image_features \(4, 8\)"),
    "one kind of labels": ((X, X, 1), {"image_labels": torch.arange(4)}, ValueError, "text_labels is missing"),
    "no labels": ((X, X, 1), {"exclude_self": True}, ValueError, "exclude_self needs labels"),
    "-1": ((X, X, 1), dict.fromkeys(("image_labels", "text_labels"), torch.arange(4) - 1), ValueError, "contains -1"),
    "a list": ((X.tolist(), X, 1), {}, TypeError, "image_features must be a torch.Tensor, got list"),
    "backend": ((X, X, 1), {"backend": "cudnn"}, ValueError, "cudnn"),
    "group": ((X, X, 1), {"group": "world"}, TypeError, "group must be a torch.distributed.ProcessGroup"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_hardest_negatives_misfit_raises(name: str) -> None:
    args, options, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        fastclip.hardest_negatives(*args, **options)


def test_integers_of_numpy_are_counts() -> None:
    assert fastclip.hardest_negatives(X, X, np.int64(2)).indices.shape == (4, 2)


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad])
def test_transforms_are_refused(transform: Any) -> None:
    with pytest.raises(RuntimeError, match=r"hardest_negatives does not support torch\.func transforms"):
        transform(lambda x: fastclip.hardest_negatives(x, X, 1).values.sum())(X[None])


SIZES = (7, 0, 5)


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    image, text = (x.double() for x in pairs(12, 12, 10))
    y = random_labels(12, 12, 5)
    return image, text, y[0] - 1, y[1] - 1


def work(rank: int, folder: Path) -> None:
    """Mine this rank's part of the batch in every form, and collect the errors of refused calls."""
    join_group(rank, len(SIZES), folder)
    own = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    image, text, y, t = (x[own] for x in batch())
    group = dist.group.WORLD
    found: dict[str, Any] = {"pairs": tuple(fastclip.hardest_negatives(image, text, 4, group=group))}
    labels = {"image_labels": y + 1, "text_labels": t + 1}
    found["labels"] = tuple(fastclip.hardest_negatives(image, text, 4, **labels, group=group))
    labels = {"image_labels": y, "text_labels": t, "ignore_label": -1}
    found["ignored"] = tuple(fastclip.hardest_negatives(image, text, 4, **labels, group=group))
    labels = {"image_labels": y + 1, "text_labels": y + 1, "exclude_self": True}
    found["self"] = tuple(fastclip.hardest_negatives(image, text, 4, **labels, group=group))
    for name, k in (("disagree", 2 + (rank == 2)), ("refuse", 2.0 if rank == 2 else 2)):
        with pytest.raises((ValueError, TypeError)) as error:
            fastclip.hardest_negatives(image, text, k, group=group)
        found[name] = str(error.value)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@forks
def test_ranks_mine_the_whole_batch(tmp_path: Path) -> None:
    """Three ranks, one without a row, find the texts of all ranks, as one process does in the whole batch."""
    for pid in [forked(lambda rank=rank: work(rank, tmp_path), tmp_path / f"said {rank}") for rank in range(3)]:  # type: ignore[misc]
        assert ended(pid, 60) == 0, [path.read_text() for path in tmp_path.glob("said *")]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    image, text, y, t = batch()
    assert (y == -1).any() and (t == -1).any()
    forms: dict[str, dict[str, Any]] = {
        "pairs": {},
        "labels": {"image_labels": y + 1, "text_labels": t + 1},
        "ignored": {"image_labels": y, "text_labels": t, "ignore_label": -1},
        "self": {"image_labels": y + 1, "text_labels": y + 1, "exclude_self": True},
    }
    for name, options in forms.items():
        one = fastclip.hardest_negatives(image, text, 4, **options)
        for ours, expected in zip(zip(*(found[name] for found in ranks)), one):
            torch.testing.assert_close(torch.cat(ours), expected, rtol=0, atol=1e-14)
    for found in ranks:
        assert "disagree on k: " in found["disagree"]
    assert ranks[2]["refuse"] == "k must be a positive integer, got float"
    assert ranks[0]["refuse"].startswith("rank 2 of the group refused its arguments: TypeError: k must be")
