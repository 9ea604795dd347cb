"""Losses beside the packages that have them, forward and backward; rows in results/recipes.csv.

    python -m benchmarks.recipes --sizes 1024,4096 --dim 512 --rounds 5

Before a loss is timed, its value and gradients are compared with the peer's. A round runs both once, and peak memory is
measured in processes of their own.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastclip
from benchmarks.harness import append, machine, quantile, wall_clock
from benchmarks.losses.peak_memory import peak_of, return_what_is_freed
from fastclip.system.installed import installed_version

RESULTS = Path(__file__).parent / "results" / "recipes.csv"
DOCS = Path(__file__).parents[1] / "docs" / "recipes.md"
SCALE, PREFIXES, HARDEST = 20.0, (16, 32, 64), 16
Loss = Callable[..., Any]  # of matrices of features (N, D)


class Recipe(NamedTuple):
    """A loss, and what it is compared with."""

    inputs: int  # number of matrices (N, D)
    ours: Callable[[], Loss]
    peer: str  # name and class
    theirs: Callable[[], Loss]
    gradients: int = 2  # number of inputs that get gradients; 0: there is no backward pass


@functools.cache
def of_page(name: str) -> Loss:
    """Return a function of docs/recipes.md."""
    names: dict[str, Any] = dict(zip(("image_features", "text_features"), torch.randn(2, 8, 4)))
    names["logit_scale"] = torch.tensor(SCALE)
    for block in DOCS.read_text(encoding="utf-8").split("```python\n")[1:]:
        exec(block.split("```\n")[0], names)
    return names[name]


def page(name: str) -> Loss:
    return lambda *x: of_page(name)(*x, torch.tensor(SCALE, device=x[0].device))


class Embeddings(torch.nn.Sequential):
    """A model whose embeddings are its inputs."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Identity())


def ranking(**options: Any) -> Loss:
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    loss = MultipleNegativesRankingLoss(Embeddings(), scale=SCALE, **options)
    return lambda *x: loss.compute_loss_from_embeddings(list(x), None)


def supcon(first: Tensor, second: Tensor) -> Tensor:
    from pytorch_metric_learning.losses import SupConLoss  # its NTXentLoss stores all triplets: 2 GiB at N = 256

    y = torch.arange(len(first), device=first.device).repeat(2)
    return SupConLoss(temperature=1 / SCALE)(torch.cat([first, second]), y)


def simclr(first: Tensor, second: Tensor) -> Tensor:
    x, y = torch.cat([first, second]), torch.arange(len(first), device=first.device).repeat(2)
    loss = fastclip.contrastive_loss(x, x, SCALE, image_labels=y, text_labels=y, exclude_self=True)
    assert isinstance(loss, Tensor)
    return loss


def prefixes(queries: Tensor, documents: Tensor) -> Tensor:
    return fastclip.matryoshka_loss(queries, documents, SCALE, prefixes=PREFIXES)


def prefixes_of_peer() -> Loss:
    from sentence_transformers.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

    class Model(torch.nn.Module):
        def _get_untruncated_embedding_dimension(self) -> int:
            return PREFIXES[-1]

        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            return dict(features)

    model = Model()
    inner = MultipleNegativesRankingLoss(model, scale=SCALE, **SYMMETRIC)
    loss = MatryoshkaLoss(model, inner, list(PREFIXES))
    return lambda *x: loss([{"sentence_embedding": one} for one in x], None)


def distilled(loss: Loss) -> Loss:
    """Return the sum of both losses of a DistillClipLoss, of fastclip or open_clip, which takes unit rows."""

    def both(*features: Tensor) -> Tensor:
        image, text, *teacher = (F.normalize(x, dim=1) for x in features)
        contrastive, distillation = loss(image, text, SCALE, *teacher, 2 * SCALE)
        total: Tensor = contrastive + distillation
        return total

    return both


def distilled_by_peer() -> Loss:
    from open_clip.loss import DistillClipLoss

    return distilled(DistillClipLoss())


def hardest(queries: Tensor, documents: Tensor) -> Tensor:
    return fastclip.hardest_negatives(queries, documents, HARDEST).values


def hardest_of_peer() -> Loss:
    from sentence_transformers.util import semantic_search

    def values(queries: Tensor, documents: Tensor) -> Tensor:
        found = semantic_search(queries, documents, top_k=HARDEST + 1)
        others = ([hit["score"] for hit in hits if hit["corpus_id"] != i][:HARDEST] for i, hits in enumerate(found))
        return torch.tensor(list(others))

    return values


def one_direction(queries: Tensor, documents: Tensor) -> Any:
    return fastclip.contrastive_loss(queries, documents, SCALE, image_weight=1.0)


SYMMETRIC: dict[str, Any] = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
FOUR = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
_RANKING = "sentence-transformers MultipleNegativesRankingLoss"
RECIPES = {
    "one direction": Recipe(2, lambda: one_direction, _RANKING, ranking),
    "joint softmax over four directions": Recipe(
        2, lambda: page("joint_loss"), _RANKING, lambda: ranking(directions=FOUR)
    ),
    "own hard negatives, weighted": Recipe(
        3,
        lambda: page("own_hard_negative_loss"),
        _RANKING,
        lambda: ranking(hardness_mode="hard_negatives", hardness_strength=5.0),
        gradients=3,
    ),
    "symmetric, three prefixes": Recipe(2, lambda: prefixes, "sentence-transformers MatryoshkaLoss", prefixes_of_peer),
    "contrastive and distillation": Recipe(
        4, lambda: distilled(fastclip.DistillClipLoss()), "open_clip DistillClipLoss", distilled_by_peer
    ),
    "hardest negatives, 16 of each": Recipe(
        2, lambda: hardest, "sentence-transformers semantic_search", hardest_of_peer, gradients=0
    ),
    "two views (SimCLR)": Recipe(2, lambda: simclr, "pytorch-metric-learning SupConLoss", lambda: supcon),
}


def features(recipe: Recipe, N: int, D: int, device: str) -> list[Tensor]:
    """Return leaves (N, D) that resemble each other, so that losses are neither 0 nor log N."""
    numbers = torch.Generator().manual_seed(0)
    first, *others = (torch.randn(N, D, generator=numbers) for _ in range(recipe.inputs))
    inputs = [x.to(device) for x in (first, *(0.3 * first + x for x in others))]
    return [x.requires_grad_() if k < recipe.gradients else x for k, x in enumerate(inputs)]


def step(recipe: Recipe, loss: Loss, inputs: list[Tensor]) -> Any:
    """Compute the loss and, unless it has none, its gradients."""
    for x in inputs:
        x.grad = None
    value = loss(*inputs)
    if recipe.gradients:
        value.backward()
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    return value


def check(recipe: Recipe, ours: Loss, theirs: Loss, inputs: list[Tensor]) -> None:
    """Raise AssertionError unless value and gradients agree, up to rounding in fp32."""
    found = []
    for loss in (ours, theirs):
        value = step(recipe, loss, inputs)
        found.append([value.detach().float(), *(x.grad for x in inputs if x.grad is not None)])
    for a, b in zip(*found, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-4, f"{a} and {b} differ"


def peak(name: str, which: str, N: int, D: int) -> float:
    """Return the MiB of a step beyond inputs and gradients, in a process of its own (on a CPU)."""
    words = ["--only", name, "--peak", which, "--sizes", str(N), "--dim", str(D)]
    command = [sys.executable, "-m", "benchmarks.recipes", *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=DOCS.parents[1])
    return round(float(done.stdout.split()[-1]), 1)


def measure_peak(recipe: Recipe, which: str, N: int, D: int) -> float:
    return_what_is_freed()
    loss = recipe.ours() if which == "fastclip" else recipe.theirs()
    step(recipe, loss, features(recipe, 8, D, "cpu"))
    inputs = features(recipe, N, D, "cpu")
    for x in inputs[: recipe.gradients]:
        x.grad = torch.ones_like(x)
    return peak_of(lambda: step(recipe, loss, inputs))


def measure(name: str, N: int, D: int, rounds: int, device: str) -> list[dict[str, Any]]:
    recipe = RECIPES[name]
    inputs = features(recipe, N, D, device)
    losses = {"fastclip": recipe.ours(), recipe.peer: recipe.theirs()}
    check(recipe, *losses.values(), inputs)
    seconds: dict[str, list[float]] = {provider: [] for provider in losses}
    for _ in range(rounds):
        for provider, loss in losses.items():
            seconds[provider].append(wall_clock(lambda loss=loss: step(recipe, loss, inputs)))
    rows = []
    for provider, times in seconds.items():
        ratios = [b / a for a, b in zip(times, seconds[recipe.peer])]
        which = "fastclip" if provider == "fastclip" else "peer"
        rows.append(
            {
                "loss": name,
                "N": N,
                "D": D,
                "provider": provider,
                "rounds": rounds,
                "median_ms": round(statistics.median(times) * 1e3, 2),
                "p20_ms": round(quantile(times, 0.2) * 1e3, 2),
                "p80_ms": round(quantile(times, 0.8) * 1e3, 2),
                "speedup_over_peer": round(statistics.median(ratios), 2),
                "peak_mib": peak(name, which, N, D) if device == "cpu" else "",
                "load": round(os.getloadavg()[0], 1),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1024,4096", help="rows N of each matrix (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=512, help="width D of the features (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--only", choices=RECIPES, help="one of the losses (default: all)")
    parser.add_argument("--peak", choices=("fastclip", "peer"), help="print only the peak memory of this provider")
    parser.add_argument("--rows", type=Path, default=RESULTS, help="CSV file to add rows to (default: %(default)s)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    sizes, D = [int(size) for size in arguments.sizes.split(",")], arguments.dim
    if arguments.peak:
        print(measure_peak(RECIPES[arguments.only], arguments.peak, sizes[0], D))
        return
    packages = ("sentence-transformers", "pytorch-metric-learning")
    about = machine() | {name.replace("-", "_"): installed_version(name) for name in packages}
    if arguments.device == "cuda":
        about["machine"] = torch.cuda.get_device_name()
    for N in sizes:
        for name in [arguments.only] if arguments.only else RECIPES:
            rows = measure(name, N, D, arguments.rounds, arguments.device)
            append(arguments.rows, rows, about)
            for row in rows:
                print(*row.values(), sep="\t", flush=True)


if __name__ == "__main__":
    main()
