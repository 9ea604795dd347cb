"""matryoshka_loss against a dense sum in fp64 and the peer's loss, in one process and in several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fastclip
from fastclip.parity.promised import LOSS
from fastclip.parity.truth import truth
from support.accuracy import check_gradient, pairs, poisoned, random_labels
from support.processes import ended, forked, forks, join_group

PREFIXES, WEIGHTS = (5, 24, 16), (0.5, 1.0, -2.0)


def dense(image: Tensor, text: Tensor, scale: float, **options: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the sum over prefixes of the loss in fp64, its gradients, and the magnitudes of their terms."""
    loss = torch.zeros((), dtype=torch.float64)
    grads = [torch.zeros_like(x, dtype=torch.float64) for x in (image, text)]
    sums = [torch.zeros_like(x, dtype=torch.float64) for x in (image, text)]
    d_scale = torch.zeros((), dtype=torch.float64)
    for d, weight in zip(PREFIXES, WEIGHTS):
        one = truth(image[:, :d], text[:, :d], scale, **options)
        loss += weight * one.loss
        d_scale += weight * one.d_scale
        for whole, part in zip((*grads, *sums), (one.d_image, one.d_text)):
            whole[:, :d] += weight * part
        for whole, part in zip(sums, (one.d_image_sum, one.d_text_sum)):
            whole[:, :d] += abs(weight) * part
    return loss, [*grads, d_scale], sums


@pytest.mark.pairwise
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["pairs", "labels", "sigmoid"])
def test_matryoshka_accurate(form: str, dtype: torch.dtype, backend: str) -> None:
    if dtype == torch.float64:
        backend = "reference"
    image, text = (poisoned(x, dtype) for x in pairs(40, 40, 24))
    y = random_labels(40, 40, 9)
    options, expected = {}, {}
    if form == "labels":
        options, expected = {"image_labels": y[0], "text_labels": y[1]}, {"labels": y}
        options["label_smoothing"] = expected["label_smoothing"] = 0.1
    if form == "sigmoid":
        options, expected = {"loss": fastclip.sigmoid_loss, "logit_bias": -3.0}, {"bias": -3.0}
    loss, grads, sums = dense(image, text, 9.0, **expected)
    scale = torch.tensor(9.0, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    given = image.requires_grad_(), text.requires_grad_(), scale
    found = fastclip.matryoshka_loss(*given, prefixes=PREFIXES, weights=WEIGHTS, backend=backend, **options)
    torch.testing.assert_close(found.detach().double(), loss, rtol=LOSS, atol=0)
    ours = torch.autograd.grad(found, given)
    for name, a, b, magnitude in zip(("d_image", "d_text"), ours, grads, sums):
        check_gradient(name, a, b, magnitude, [], 1.0, roundings=4)
    torch.testing.assert_close(ours[2].double(), grads[2], rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=0)


def test_weights_are_one_each_and_not_divided() -> None:
    image, text = pairs(20, 20, 16)
    parts = [fastclip.contrastive_loss(image[:, :d], text[:, :d], 5.0) for d in (16, 4)]
    torch.testing.assert_close(fastclip.matryoshka_loss(image, text, 5.0, prefixes=(16, 4)), sum(parts))
    prefixes = np.array([16, 4])
    torch.testing.assert_close(fastclip.matryoshka_loss(image, text, 5.0, prefixes=prefixes), sum(parts))
    total = fastclip.matryoshka_loss(image, text, 5.0, prefixes=(d for d in (4,)), weights=[3])
    torch.testing.assert_close(total, 3 * parts[1])


def test_agrees_with_sentence_transformers() -> None:
    """The value and the gradients are those of MatryoshkaLoss around the symmetric MultipleNegativesRankingLoss."""
    losses = pytest.importorskip("sentence_transformers.losses", reason="sentence-transformers is not installed")

    class Model(torch.nn.Module):
        def _get_untruncated_embedding_dimension(self) -> int:
            return 24

        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            return dict(features)

    found = []
    for peer in (False, True):
        leaves = [x.clone().requires_grad_() for x in pairs(30, 30, 24)]
        if peer:
            model = Model()
            inner = losses.MultipleNegativesRankingLoss(
                model, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
            )
            loss = losses.MatryoshkaLoss(model, inner, list(PREFIXES), [0.5, 1.0, 2.0])
            value = loss([{"sentence_embedding": x} for x in leaves], None)
        else:
            value = fastclip.matryoshka_loss(*leaves, 20.0, prefixes=PREFIXES, weights=(0.5, 1.0, 2.0))
        found.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_prefixes_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU backend multiplies the prefixes of fp32 features where they are."""
    image, text = pairs(40, 40, 24)
    copied, real = [], Tensor.contiguous
    monkeypatch.setattr(Tensor, "contiguous", lambda x, **options: copied.append(x.shape) or real(x, **options))
    fastclip.matryoshka_loss(image, text, prefixes=(8, 16), backend="cpu")
    assert copied == []


def test_matryoshka_compiles_whole() -> None:
    image, text = pairs(20, 20, 8)
    compiled = torch.compile(fastclip.matryoshka_loss, fullgraph=True, backend="aot_eager")
    options = {"prefixes": (4, 8), "weights": (1.0, 0.5)}
    torch.testing.assert_close(
        compiled(image, text, 5.0, **options), fastclip.matryoshka_loss(image, text, 5.0, **options)
    )


X = torch.randn(4, 8)
ERRORS = {
    "one number": ({"prefixes": 4}, TypeError, r"prefixes must be several integers, such as \(64, 128\), got int"),
    "none": ({"prefixes": ()}, ValueError, r"distinct integers of at least 1, got \(\)"),
    "zero": ({"prefixes": (0, 4)}, ValueError, r"at least 1, got \(0, 4\)"),
    "twice": ({"prefixes": (4, 4)}, ValueError, r"distinct integers of at least 1, got \(4, 4\)"),
    "a float": ({"prefixes": (4.0,)}, TypeError, "prefixes must be integers, got float"),
    "a bool": ({"prefixes": (True,)}, TypeError, "prefixes must be integers, got bool"),
    "beyond D": ({"prefixes": (4, 9)}, ValueError, r"at most D, got 9 for image_features \(4, 8\) float32 on cpu"),
    "weights": ({"prefixes": (4, 8), "weights": (1,)}, ValueError, r"each of the 2 prefixes, got \[1.0\]"),
    "infinite": ({"prefixes": (4,), "weights": (torch.inf,)}, ValueError, r"one finite number .* got \[inf\]"),
    "a word": ({"prefixes": (4,), "weights": ("1",)}, TypeError, r"weights\[0\] must be a number, got str"),
    "none reduction": ({"prefixes": (4,), "reduction": "none"}, ValueError, "'mean' or 'sum', got 'none'"),
    "global": (
        {"prefixes": (4,), "loss": fastclip.GlobalContrastiveLoss(9), "index": torch.arange(4)},
        TypeError,
        "loss must not be a GlobalContrastiveLoss: it keeps one running mean per sample",
    ),
    "no function": ({"prefixes": (4,), "loss": "sigmoid"}, TypeError, "loss must be a function.*, got str"),
    "unknown option": ({"prefixes": (4,), "temperature": 1.0}, TypeError, "temperature"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_matryoshka_misfit_raises(name: str) -> None:
    options, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        fastclip.matryoshka_loss(X, X, **options)


def test_features_are_checked_first() -> None:
    with pytest.raises(TypeError, match=r"text_features must be a torch\.Tensor, got list"):
        fastclip.matryoshka_loss(X, X.tolist(), prefixes=(4,))
    with pytest.raises(ValueError, match="must be matrices"):
        fastclip.matryoshka_loss(X[0], X[0], prefixes=(4,))


SIZES = (7, 0, 5)


def gradients(group: Any, image: Tensor, text: Tensor, **options: Any) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (image, text)]
    value = fastclip.matryoshka_loss(*leaves, 7.0, prefixes=PREFIXES, weights=WEIGHTS, group=group, **options)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def work(rank: int, folder: Path) -> None:
    join_group(rank, len(SIZES), folder)
    own = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    image, text = (x.double()[own] for x in pairs(12, 12, 24))
    group, odd = dist.group.WORLD, rank == 2
    found: dict[str, Any] = {comm: gradients(group, image, text, comm=comm) for comm in ("gather", "ring")}
    for name, options in {
        "prefixes": {"prefixes": (4, 8) if odd else (4,)},
        "weights": {"prefixes": (4,), "weights": (2.0 if odd else 1.0,)},
        "refused": {"prefixes": (0,) if odd else (4,)},
    }.items():
        with pytest.raises(ValueError) as error:
            fastclip.matryoshka_loss(image, text, group=group, **options)
        found[name] = str(error.value)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@forks
def test_ranks_have_the_loss_of_one_process(tmp_path: Path) -> None:
    for pid in [forked(lambda rank=rank: work(rank, tmp_path), tmp_path / f"said {rank}") for rank in range(3)]:  # type: ignore[misc]
        assert ended(pid, 60) == 0, [path.read_text() for path in tmp_path.glob("said *")]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    one = gradients(None, *(x.double() for x in pairs(12, 12, 24)))
    for comm in ("gather", "ring"):
        value, *grads = zip(*(found[comm] for found in ranks))
        torch.testing.assert_close(torch.stack(value).mean(), one[0])
        for ours, expected in zip(grads, one[1:]):
            torch.testing.assert_close(torch.cat(ours), 3 * expected)
    for found in ranks:
        assert "disagree on prefixes: (4" in found["prefixes"] and "disagree on weights: [" in found["weights"]
        assert "prefixes must be distinct integers of at least 1, got (0,)" in found["refused"]
