"""logit_statistics returns the sums over the logits and their gradients that a dense computation gives in fp64."""

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
from support.accuracy import counted_products, pairs, poisoned
from support.processes import ended, forked, forks, join_group

SCALE = 9.0
FIELDS = fastclip.LogitStatistics._fields
CASES: dict[str, dict[str, Any]] = {
    "pairs": {},
    "not normalised": {"normalize": False},
    "labels": {"classes": 30},
    "self": {"classes": 30, "exclude_self": True},
    "ignored": {"classes": 30, "ignore_label": 0},
    "no positive": {"classes": 0},
    "margin": {"negative_margin": -0.5},
    "margin, labels": {"classes": 30, "negative_margin": 0.1},
}


def dense(image: Tensor, text: Tensor, scale: Tensor, options: dict[str, Any]) -> tuple[Tensor, ...]:
    """Compute the six vectors from the whole matrix. Sets without a logit have -inf, with gradient 0."""
    options = dict(options)
    normalize, exclude_self = options.pop("normalize", True), options.pop("exclude_self", False)
    ignored, margin = options.pop("ignore_label", None), options.pop("negative_margin", None)
    u, v = (F.normalize(x, dim=1) if normalize else x for x in (image, text))
    z = scale * u @ v.T
    positive, counts = torch.eye(*z.shape, dtype=torch.bool), torch.ones(z.shape, dtype=torch.bool)
    if options:
        y = options["image_labels"], options["text_labels"]
        positive = y[0][:, None] == y[1]
        if ignored is not None:
            counts = (y[0] != ignored)[:, None] & (y[1] != ignored)
    if exclude_self:
        counts &= ~torch.eye(*z.shape, dtype=torch.bool)

    def lse(where: Tensor, dim: int) -> Tensor:
        some = where.any(dim, keepdim=True)
        total = z.masked_fill(~where, -torch.inf).where(some, 0.0).logsumexp(dim)
        return total.where(some.squeeze(dim), -torch.inf)

    at, off = positive & counts, ~positive & counts
    sums = [torch.where(at, z, 0.0).sum(dim) for dim in (1, 0)]
    negatives = off, off
    if margin is not None:  # a negative far above the mean positive of its row, or of its column, is left out there
        far = (z - torch.where(at, z, 0.0).sum(dim, keepdim=True) / at.sum(dim, keepdim=True) for dim in (1, 0))
        negatives = tuple(off & ~(above > margin * scale) for above in far)  # NaN without a positive: all count
        assert all((kept != off).any() for kept in negatives)
    return lse(negatives[0], 1), lse(negatives[1], 0), *sums, lse(at, 1), lse(at, 0)


def problem(case: str, M: int, N: int, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    options = dict(CASES[case])
    classes = options.pop("classes", None)
    M = M if classes is not None and "exclude_self" not in options else N
    image, text = (x.to(dtype) for x in pairs(M, N, 24, noise=1.0))
    if classes is not None:
        numbers = torch.Generator().manual_seed(1)
        y = [torch.randint(0, max(classes, 1), (size,), generator=numbers) for size in (M, N)]
        if not classes:
            y[1] += 1
        if "exclude_self" in options:
            y[1] = y[0]
        options |= {"image_labels": y[0], "text_labels": y[1]}
    if case == "not normalised":
        image = image * 0.4
    return [image, text, torch.tensor(SCALE, dtype=torch.promote_types(dtype, torch.float32))], options


def weighted(found: tuple[Tensor, ...]) -> Tensor:
    """Return a sum of all finite values with fixed random weights, which differentiates each of them."""
    numbers = torch.Generator().manual_seed(2)
    total = found[0].new_zeros(())
    for x in found:
        w = torch.rand(len(x), generator=numbers, dtype=torch.float64) - 0.3
        total = total + (w * x.where(x.isfinite(), 0.0)).sum()
    return total


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str, dtype: torch.dtype, backend: str) -> None:
    inputs, options = problem(case, 90, 130, dtype)
    leaves = [poisoned(x, dtype).requires_grad_() if x.dim() else x.requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found = fastclip.logit_statistics(*leaves, **options, backend=backend)
    expected = dense(*exact, options)
    for name, ours, true in zip(FIELDS, found, expected, strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, true, rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    gradients = torch.autograd.grad(weighted(found), leaves)
    roundoff = 4e-3 if dtype == torch.bfloat16 else 3e-5
    for ours, true in zip(gradients, torch.autograd.grad(weighted(expected), exact)):
        assert float((ours.double() - true).norm() / true.norm()) < roundoff


@pytest.mark.parametrize("case", CASES)
def test_exact_in_fp64(case: str) -> None:
    inputs, options = problem(case, 40, 60, torch.float64)
    leaves = [x.requires_grad_() for x in inputs]
    found, expected = fastclip.logit_statistics(*leaves, **options), dense(*leaves, options)
    for ours, true in zip(found, expected):
        torch.testing.assert_close(ours, true, rtol=1e-13, atol=1e-13)
    pair = (torch.autograd.grad(weighted(x), leaves) for x in (found, expected))
    for ours, true in zip(*pair):
        torch.testing.assert_close(ours, true, rtol=1e-11, atol=1e-12)


def test_one_positive_is_its_own_log_sum_exp() -> None:
    inputs, _ = problem("pairs", 8, 8, torch.float32)
    image = inputs[0].requires_grad_()
    s = fastclip.logit_statistics(image, *inputs[1:])
    of_pos, of_lse = (torch.autograd.grad(x.sum(), image, retain_graph=True)[0] for x in (s.row_pos, s.row_pos_lse))
    assert torch.equal(s.row_pos, s.row_pos_lse) and torch.equal(of_pos, of_lse)
    assert of_pos.norm() > 0


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_ignored_rows_are_empty(backend: str) -> None:
    inputs, options = problem("ignored", 90, 130, torch.float32)
    leaves = [x.requires_grad_() for x in inputs[:2]]
    s = fastclip.logit_statistics(*leaves, inputs[2], **options, backend=backend)
    for k, side in enumerate(("image", "text")):
        out = options[f"{side}_labels"] == 0
        assert out.any()
        assert torch.all(s[k][out] == -torch.inf) and torch.all(s[k + 4][out] == -torch.inf) and not s[k + 2][out].any()
        assert not torch.autograd.grad(weighted(s), leaves[k], retain_graph=True)[0][out].any()


def test_compiles_whole() -> None:
    inputs, options = problem("labels", 20, 30, torch.float32)
    compiled = torch.compile(fastclip.logit_statistics, fullgraph=True, backend="aot_eager")
    for ours, true in zip(compiled(*inputs, **options), fastclip.logit_statistics(*inputs, **options), strict=True):
        assert torch.equal(ours, true)


def test_errors_name_the_arguments() -> None:
    image, text = torch.randn(2, 6, 4)
    with pytest.raises(ValueError, match=r"as many texts as images: image_features \(6, 4\) .* text_features \(5, 4\)"):
        fastclip.logit_statistics(image, text[:5])
    with pytest.raises(ValueError, match="exclude_self needs labels"):
        fastclip.logit_statistics(image, text, exclude_self=True)
    with pytest.raises(ValueError, match="comm must be"):
        fastclip.logit_statistics(image, text, comm="tree")


def test_operations_are_those_of_four_products(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, options = problem("labels", 200, 300, torch.float32)
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", "0.1")  # too small to keep the logits for the backward pass
    counted = counted_products(monkeypatch)
    image, text = (x.requires_grad_() for x in inputs[:2])
    weighted(fastclip.logit_statistics(image, text, inputs[2], **options, backend="cpu")).backward()
    assert sum(counted) == pytest.approx(8 * 200 * 300 * 24, rel=0.05)


SHARDED = ("pairs", "labels", "self", "ignored", "no positive", "margin", "margin, labels")


def of_whole(case: str) -> tuple[list[Tensor], dict[str, Any]]:
    return problem(case, 18, 18, torch.float64)


def work(rank: int, folder: Path) -> None:
    """Store the statistics of a rank's unequal shard, and the gradients of a sum over all ranks' statistics."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    join_group(rank, 3, folder)
    own = slice(*((0, 11), (11, 11), (11, 18))[rank])  # the second rank has no row
    found: dict[str, list[Tensor]] = {}
    for case in SHARDED:
        inputs, options = of_whole(case)
        leaves = [x[own].clone().requires_grad_() for x in inputs[:2]]
        options = {name: x[own] if isinstance(x, Tensor) else x for name, x in options.items()}
        for comm in ("gather", "ring"):
            of_rank = fastclip.logit_statistics(*leaves, SCALE, **options, group=dist.group.WORLD, comm=comm)
            total = torch.stack([x.where(x.isfinite(), 0.0).square().sum() for x in of_rank]).sum()
            gradients = torch.autograd.grad(total, leaves)
            found[f"{case} {comm}"] = [*(x.detach() for x in of_rank), *gradients]
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@forks
def test_ranks_have_the_statistics_of_one_process(tmp_path: Path) -> None:
    for pid in [forked(lambda rank=rank: work(rank, tmp_path), tmp_path / f"said {rank}") for rank in range(3)]:  # type: ignore[misc]
        assert ended(pid, 60) == 0, [path.read_text() for path in tmp_path.glob("said *")]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    for case in SHARDED:
        (image, text, _), options = of_whole(case)
        leaves = [image.requires_grad_(), text.requires_grad_()]
        one = dense(*leaves, torch.tensor(SCALE), options)
        total = torch.stack([x.where(x.isfinite(), 0.0).square().sum() for x in one]).sum()
        expected = [*one, *torch.autograd.grad(total, leaves)]
        for comm in ("gather", "ring"):
            for shards, true in zip(zip(*(found[f"{case} {comm}"] for found in ranks)), expected, strict=True):
                torch.testing.assert_close(torch.cat(shards), true.detach(), rtol=1e-11, atol=1e-11)
