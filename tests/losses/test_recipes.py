"""The recipes of docs/recipes.md compute what their references do. Their code is taken from the page."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from support import ROOT
from support.pages import blocks
from support.processes import ended, forked, forks, join_group

N, D, SCALE = 120, 48, 20.0
BACKENDS = {"reference": torch.float64, "cpu": torch.float32}


@functools.cache
def page() -> dict[str, Any]:
    """Run the page's Python and return its names."""
    image, text = torch.randn(2, 16, 8)
    names: dict[str, Any] = {"image_features": image, "text_features": text, "logit_scale": torch.tensor(14.3)}
    for block in blocks(ROOT / "docs" / "recipes.md", "python"):
        exec(block.code, names)
    return names


def features(count: int) -> list[Tensor]:
    """Return matrices (N, D) in fp64. The second resembles the first, so that losses and softmaxes are not extreme."""
    numbers = torch.Generator().manual_seed(0)
    first, *others = torch.randn(count, N, D, generator=numbers, dtype=torch.float64)
    return [first, *(0.3 * first + x for x in others)]


def step(loss: Callable[..., Tensor], inputs: list[Tensor], scale: float | Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = loss(*leaves, scale)
    value.backward()
    return value.detach().double(), [x.grad.double() for x in leaves]


def compare(recipe: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Compare value and gradients, that of the scale too if the reference differentiates it."""
    expected, true = step(reference, inputs, SCALE)
    for backend, dtype in BACKENDS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FASTCLIP_BACKEND", backend)
            scale = torch.tensor(SCALE, dtype=dtype)
            value, gradients = step(recipe, [x.to(dtype) for x in inputs], scale)
        close = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(value, expected, rtol=close, atol=0.0)
        for ours, theirs in zip(gradients, true, strict=True):
            assert float((ours - theirs).norm() / theirs.norm()) < 3 * close, backend


def logits(queries: Tensor, documents: Tensor) -> Tensor:
    return F.normalize(queries, dim=1) @ F.normalize(documents, dim=1).T


def ranking(**options: Any) -> Callable[..., Tensor]:
    """Return sentence-transformers' loss as a function of queries, documents and, if any, hard negatives."""
    pytest.importorskip("sentence_transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # version 6 moved the module
        from sentence_transformers.losses import MultipleNegativesRankingLoss

    class Model(torch.nn.Sequential):
        def __init__(self) -> None:
            super().__init__(torch.nn.Identity())

    def loss(*inputs: Any) -> Tensor:
        *embeddings, scale = inputs
        return MultipleNegativesRankingLoss(Model(), scale=scale, **options).compute_loss_from_embeddings(
            list(embeddings), None
        )

    return loss


def test_clip_from_the_statistics() -> None:
    names = page()
    torch.testing.assert_close(
        names["clip"],
        names["fastclip"].contrastive_loss(names["image_features"], names["text_features"], 14.3).double(),
        rtol=1e-6,
        atol=0.0,
    )


def test_decoupled_loss() -> None:
    def dense(images: Tensor, texts: Tensor, scale: float) -> Tensor:
        z = scale * logits(images, texts)
        own = torch.eye(N, dtype=torch.bool)
        negatives = z.masked_fill(own, -torch.inf)
        return ((negatives.logsumexp(1) - z.diag()) + (negatives.logsumexp(0) - z.diag())).mean() / 2

    compare(page()["decoupled_loss"], dense, features(2))


def test_joint_softmax_over_four_directions() -> None:
    directions = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
    compare(page()["joint_loss"], ranking(directions=directions), features(2))


@pytest.mark.parametrize("hardness", [0.0, 5.0])
@pytest.mark.parametrize(
    ("name", "mode"), [("own_hard_negative_loss", "hard_negatives"), ("all_hard_loss", "all_negatives")]
)
def test_hard_negatives(name: str, mode: str, hardness: float) -> None:
    def recipe(queries: Tensor, documents: Tensor, hard: Tensor, scale: Tensor) -> Tensor:
        return page()[name](queries, documents, hard, scale, hardness)

    compare(recipe, ranking(hardness_mode=mode, hardness_strength=hardness), features(3))


@pytest.mark.parametrize("name", ["own_hard_negative_loss", "all_hard_loss"])
def test_scale_of_hard_negatives_is_learned(name: str) -> None:
    """The penalty is a constant, so the derivative of a weighted logit with respect to the scale is its cosine."""
    queries, documents, hard = features(3)
    cosines = logits(queries, torch.cat([documents, hard]))
    own, others = torch.eye(N, dtype=torch.bool), torch.zeros(N, N, dtype=torch.bool)
    punished = torch.cat([others, own] if name == "own_hard_negative_loss" else [~own, ~others], 1)

    def dense(scale: Tensor) -> Tensor:
        return F.cross_entropy(scale * cosines + 5.0 * cosines * punished, torch.arange(N))

    scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    found = page()[name](queries, documents, hard, scale, 5.0)
    torch.testing.assert_close(
        torch.autograd.grad(found, scale), torch.autograd.grad(dense(scale), scale), rtol=1e-11, atol=0.0
    )


def test_queue_of_negatives() -> None:
    queue = torch.randn(3 * N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def recipe(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
        return page()["queue_loss"](queries, keys, queue.to(keys.dtype), scale)

    def dense(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
        return F.cross_entropy(scale * logits(queries, torch.cat([keys, queue])), torch.arange(N))

    compare(recipe, dense, features(2))


def test_global_loss() -> None:
    u = 5 * torch.rand(2, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 1

    def recipe(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
        estimates = u.log()
        loss = page()["global_loss"](images, texts, scale, *estimates, 0.6)
        assert not torch.equal(estimates, u.log())
        return loss

    def dense(images: Tensor, texts: Tensor, scale: float) -> Tensor:
        z, loss = scale * logits(images, texts), 0.0
        for side, of_side in zip((z, z.T), u):
            g = (side - side.diag()[:, None]).exp().masked_fill(torch.eye(N, dtype=torch.bool), 0.0).sum(1) / (N - 1)
            loss = loss + (g / (0.4 * of_side + 0.6 * g).detach()).mean() / 2
        return loss

    compare(recipe, dense, features(2))


PARTS = (slice(0, 50), slice(50, 3 * N))  # of the queue, with more rows on the second rank
SHARDED = {
    "decoupled_loss": 2,
    "joint_loss": 2,
    "own_hard_negative_loss": 3,
    "all_hard_loss": 3,
    "queue_loss": 2,
    "global_loss": 2,
}


def gradients(name: str, rows: slice, part: slice, **options: Any) -> list[Tensor]:
    """Return the value and the gradients of a recipe for rows of the batch and a part of the queue."""
    leaves = [x[rows].clone().requires_grad_() for x in features(SHARDED[name])]
    scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    numbers = torch.Generator().manual_seed(1)
    more: list[Any] = [scale]
    if name == "queue_loss":
        more = [torch.randn(3 * N, D, generator=numbers, dtype=torch.float64)[part], scale]
    if name == "global_loss":
        estimates = 5 * torch.rand(2, N, generator=numbers, dtype=torch.float64)
        more = [scale, *estimates[:, rows], 0.6]
        options["batch"] = N
    value = page()[name](*leaves, *more, **options)
    return [value.detach(), *torch.autograd.grad(value, [*leaves, scale])]


def work(rank: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    join_group(rank, 2, folder)
    rows, group = slice(rank * N // 2, (rank + 1) * N // 2), dist.group.WORLD
    found = {
        f"{name} {comm}": gradients(name, rows, PARTS[rank], group=group, comm=comm)
        for name in SHARDED
        for comm in ("gather", "ring")
    }
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@forks
def test_two_processes_have_the_loss_of_one(tmp_path: Path) -> None:
    """The mean over processes is the loss of the whole batch and queue, also in its gradients."""
    expected = {name: gradients(name, slice(0, N), slice(0, 3 * N)) for name in SHARDED}
    for pid in [forked(lambda rank=rank: work(rank, tmp_path), tmp_path / f"said {rank}") for rank in range(2)]:  # type: ignore[misc]
        assert ended(pid, 60) == 0, [path.read_text() for path in tmp_path.glob("said *")]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, (loss, *whole, d_scale) in expected.items():
        for comm in ("gather", "ring"):
            value, *shards, of_scale = zip(*(found[f"{name} {comm}"] for found in ranks))
            for ours, true in ((value, loss), (of_scale, d_scale)):
                torch.testing.assert_close(torch.stack(ours).mean(), true, rtol=1e-12, atol=0.0)
            for ours, true in zip(shards, whole, strict=True):
                assert float((torch.cat(ours) / 2 - true).norm() / true.norm()) < 1e-12, f"{name} {comm}"
