"""Rows without a label: the loss equals the loss of the batch without these rows."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import fastclip
from fastclip.parity.promised import LOSS
from fastclip.parity.truth import truth
from support.accuracy import check_gradient, pairs
from support.processes import ended, forked, forks, join_group

SCALE = 7.0
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weighted and smoothed": {"image_weight": 0.3, "label_smoothing": 0.1},
    "self pairs": {"exclude_self": True, "label_smoothing": 0.1},
    "not normalised": {"normalize": False},
}


def batch(own: bool = False, M: int = 24, N: int = 20, ignored: int = -1) -> tuple[Tensor, ...]:
    """Return features and labels, a third of which are ignored. With `own`, images and texts have the same labels."""
    image, text = pairs(M, M if own else N, 12)
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 8, (2, M), generator=generator)
    y[torch.rand(2, M, generator=generator) < 1 / 3] = ignored
    return image, text, y[0], y[0] if own else y[1, : len(text)]


def gradients(loss: Any, image: Tensor, text: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (image, text)]
    scale = torch.tensor(
        SCALE, dtype=image.dtype if image.dtype == torch.float64 else torch.float32, requires_grad=True
    )
    value = loss(*leaves, scale)
    return [value.detach(), *torch.autograd.grad(value, [*leaves, scale])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.fault(
    "Some rows have the label -1, which marks a row without a class",
    "An error states this, or with `ignore_label` these rows are left out",
)
def test_loss_is_that_without_the_rows(name: str, dtype: torch.dtype) -> None:
    """Loss and gradients equal the fp64 truth of the remaining features, and the gradients of the ignored
    rows are 0.
    """
    options = OPTIONS[name]
    image, text, y, t = batch(own="exclude_self" in options)
    image, text = image.to(dtype), text.to(dtype)
    value, *grads = gradients(
        lambda *x: fastclip.contrastive_loss(*x, image_labels=y, text_labels=t, ignore_label=-1, **options), image, text
    )
    rows, columns = y != -1, t != -1
    true = truth(image[rows], text[columns], SCALE, labels=(y[rows], t[columns]), **options)
    assert float(value) == pytest.approx(float(true.loss), rel=LOSS)
    assert float(grads[2]) == pytest.approx(float(true.d_scale), rel=1e-3, abs=1e-6)
    assert not grads[0][~rows].any() and not grads[1][~columns].any()
    check_gradient("d_image", grads[0][rows], true.d_image, true.d_image_sum, [], 1.0, 2)
    check_gradient("d_text", grads[1][columns], true.d_text, true.d_text_sum, [], 1.0, 2)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions(reduction: str) -> None:
    """An ignored row has loss 0, as a row without a positive has."""
    image, text, y, t = (x.double() if x.is_floating_point() else x for x in batch())
    found = fastclip.contrastive_loss(image, text, image_labels=y, text_labels=t, ignore_label=-1, reduction=reduction)
    rows, columns = y != -1, t != -1
    expected = fastclip.contrastive_loss(
        image[rows], text[columns], image_labels=y[rows], text_labels=t[columns], reduction=reduction
    )
    if reduction == "sum":
        torch.testing.assert_close(found, expected)
        return
    for ours, true, kept in zip(found, expected, (rows, columns)):
        torch.testing.assert_close(ours[kept], true)
        assert ours.shape == kept.shape and not ours[~kept].any()


def test_statistics_and_views() -> None:
    image, text, y, t = batch()
    found = fastclip.contrastive_stats(image, text, image_labels=y, text_labels=t, ignore_label=-1)
    kept = [y != -1, t != -1]
    expected = fastclip.contrastive_stats(
        image[kept[0]], text[kept[1]], image_labels=y[kept[0]], text_labels=t[kept[1]]
    )
    for k, (name, ours, true) in enumerate(zip(found._fields, found, expected)):
        torch.testing.assert_close(ours[kept[k % 2]], true, msg=lambda told, name=name: f"{name}: {told}")
        left_out = ours[~kept[k % 2]]
        assert (left_out == (-torch.inf if name.endswith("lse") else 0)).all() and ours.dtype == true.dtype
    image, text, y, _ = batch(own=True)
    views = image, text, image.flip(1)
    ours = fastclip.multiview_loss(views, labels=y, ignore_label=-1)
    torch.testing.assert_close(ours, fastclip.multiview_loss([x[y != -1] for x in views], labels=y[y != -1]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.uint8])
@pytest.mark.parametrize("ignored", [-1, -100, 5, 255, 300, np.int64(5)])
def test_any_label_can_be_ignored(dtype: torch.dtype, ignored: Any) -> None:
    """Labels are compared with the ignored one as numbers: 255 as uint8 is not -1."""
    image, text, y, t = batch(ignored=5)
    y, t = y.to(dtype), t.to(dtype)
    if dtype == torch.uint8:
        y[0] = t[0] = 255
    loss = fastclip.contrastive_loss(image, text, image_labels=y, text_labels=t, ignore_label=ignored)
    rows, columns = y.long() != int(ignored), t.long() != int(ignored)
    expected = fastclip.contrastive_loss(
        image[rows], text[columns], image_labels=y[rows], text_labels=t[columns], ignore_label=1000
    )
    torch.testing.assert_close(loss, expected)


def refusals() -> dict[str, tuple[type[Exception], str, dict[str, Any]]]:
    y, some = torch.arange(4) % 2, torch.tensor([0, 0, -1, 1])
    labels = {"image_labels": y, "text_labels": y}
    return {
        "not asked for": (
            ValueError,
            "text_labels contains -1: to leave these rows out, pass ignore_label=-1. If -1 is a class, number the",
            labels | {"text_labels": some},
        ),
        "no labels": (ValueError, "ignore_label needs image_labels and text_labels", {"ignore_label": -1}),
        "a word": (TypeError, "must be an integer or None, got str", labels | {"ignore_label": "none"}),
        "a flag": (TypeError, "must be an integer or None, got bool", labels | {"ignore_label": True}),
        "nothing left": (
            ValueError,
            "no pair remains: every image label is ignore_label=7",
            labels | {"image_labels": y * 0 + 7, "ignore_label": 7},
        ),
        "no positive left": (
            ValueError,
            "no image label equals a text label",
            {"image_labels": some, "text_labels": torch.tensor([-1, 2, 2, -1]), "ignore_label": -1},
        ),
        "self pairs": (
            ValueError,
            "exclude_self needs ignore_label in the same rows",
            labels | {"text_labels": some, "ignore_label": -1, "exclude_self": True},
        ),
    }


@pytest.mark.parametrize("name", refusals())
def test_what_does_not_fit_is_refused(name: str) -> None:
    error, message, options = refusals()[name]
    x = torch.randn(2, 4, 8)
    for function in (fastclip.contrastive_loss, fastclip.contrastive_stats):
        with pytest.raises(error, match=message):
            function(*x, **options)


def test_other_numbers_below_0_are_classes() -> None:
    """Negative labels other than the ignored one are classes, for 64-bit hashes are signed. So is -1 if another label
    is ignored.
    """
    image, text, y, t = batch()
    loss = fastclip.contrastive_loss(image, text, image_labels=y - 9, text_labels=t - 9)
    torch.testing.assert_close(
        fastclip.contrastive_loss(image, text, image_labels=y, text_labels=t, ignore_label=-2), loss
    )


def test_compiled_call_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    image, text, y, t = batch()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # an actual compilation would take seconds
    with pytest.raises(ValueError, match=r"torch.compile, CUDA graphs .* cannot handle: .*features\[labels != -1\]"):
        fastclip.contrastive_loss(image, text, image_labels=y, text_labels=t, ignore_label=-1)


def test_graphs_assert_that_every_row_has_a_label() -> None:
    """A recorded graph, which cannot wait for the labels as on a GPU, refuses rows without a label by a device
    assertion.
    """
    image, text, y, t = batch()

    def loss(image: Tensor, text: Tensor, y: Tensor, t: Tensor) -> Tensor:
        return fastclip.contrastive_loss(image, text, image_labels=y, text_labels=t)

    some = y.clamp_min(0), t.clamp_min(0)
    graph = make_fx(loss)(image, text, *some)
    torch.testing.assert_close(graph(image, text, *some), loss(image, text, *some))
    for labels, side in (((y, some[1]), "image"), ((some[0], t), "text")):
        with pytest.raises(
            RuntimeError, match=f"{side}_labels contains -1: to leave these rows out, pass ignore_label=-1"
        ):
            graph(image, text, *labels)


def test_labels_of_vmap_are_refused() -> None:
    image, text, y, t = batch()

    def loss(y: Tensor) -> Tensor:
        return fastclip.contrastive_loss(image, text, image_labels=y, text_labels=t, ignore_label=-1)

    with pytest.raises(ValueError, match=r"torch.func.vmap cannot handle"):
        torch.func.vmap(loss)(y[None])


def work(rank: int, folder: Path) -> None:
    """Run both forms on two ranks, the second of which has no label left in one case, and collect the errors of refused
    calls.
    """
    warnings.simplefilter("ignore")
    join_group(rank, 2, folder)
    found: dict[str, Any] = {}
    for case in ("some", "none"):
        image, text, y, t = sharded(case, rank)
        for comm in ("gather", "ring"):
            found[f"{case} {comm}"] = gradients(
                lambda *x, y=y, t=t, comm=comm: fastclip.contrastive_loss(
                    *x,
                    image_labels=y,
                    text_labels=t,
                    ignore_label=-1,
                    label_smoothing=0.1,
                    group=dist.group.WORLD,
                    comm=comm,
                ),
                image,
                text,
            )
    stats = fastclip.contrastive_stats(
        image, text, SCALE, image_labels=y, text_labels=t, ignore_label=-1, group=dist.group.WORLD
    )
    found["stats"] = tuple(stats)
    for name, options in {
        "one asks": {"ignore_label": -1 if rank else None},
        "they differ": {"ignore_label": 7 + rank},
        "graphs": {"ignore_label": -1, "equal_shards": True},
        "all": {"ignore_label": 3},
    }.items():
        labels = {side: torch.full((len(x),), 3) for side, x in (("image_labels", image), ("text_labels", text))}
        if name == "one asks":
            labels = {"image_labels": y, "text_labels": t}
        with pytest.raises(ValueError) as error:
            fastclip.contrastive_loss(image, text, SCALE, **labels, **options, group=dist.group.WORLD)
        found[name] = str(error.value)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def sharded(case: str, rank: int | None = None) -> tuple[Tensor, ...]:
    """Return the whole batch, or one rank's half of it."""
    image, text, y, t = (x.double() if x.is_floating_point() else x for x in batch())
    if case == "none":
        y[12:] = t[10:] = -1
    own = slice(None) if rank is None else slice(12 * rank, 12 * rank + 12)
    own_texts = slice(None) if rank is None else slice(10 * rank, 10 * rank + 10)
    return image[own], text[own_texts], y[own], t[own_texts]


@forks
def test_ranks_have_the_loss_of_one_process(tmp_path: Path) -> None:
    for pid in [forked(lambda rank=rank: work(rank, tmp_path), tmp_path / f"said {rank}") for rank in range(2)]:  # type: ignore[misc]
        assert ended(pid, 60) == 0, [path.read_text() for path in tmp_path.glob("said *")]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for case in ("some", "none"):
        image, text, y, t = sharded(case)
        rows, columns = y != -1, t != -1
        true = truth(image[rows], text[columns], SCALE, labels=(y[rows], t[columns]), label_smoothing=0.1)
        for comm in ("gather", "ring"):
            loss, d_image, d_text, d_scale = zip(*(found[f"{case} {comm}"] for found in ranks))
            torch.testing.assert_close(torch.stack(loss).mean(), true.loss)
            torch.testing.assert_close(torch.stack(d_scale).mean(), true.d_scale)
            for ours, expected, kept in ((d_image, true.d_image, rows), (d_text, true.d_text, columns)):
                whole = torch.zeros(len(kept), 12, dtype=torch.float64)
                whole[kept] = 2 * expected
                torch.testing.assert_close(torch.cat(ours), whole)
    one = fastclip.contrastive_stats(image, text, SCALE, image_labels=y, text_labels=t, ignore_label=-1)
    for ours, expected in zip(zip(*(found["stats"] for found in ranks)), one):
        torch.testing.assert_close(torch.cat(ours), expected)
    assert "image_labels contains -1" in ranks[0]["one asks"]
    assert ranks[1]["one asks"].startswith(
        "rank 0 of the group refused its arguments: ValueError: image_labels contains"
    )
    for found in ranks:
        assert "disagree on ignore_label" in found["they differ"]
        assert "features[labels != -1]" in found["graphs"] and "equal_shards=True cannot handle" in found["graphs"]
        assert found["all"] == "features must not be empty: no rank has an image, or no rank has a text"
