"""One loss over the shards of 1, 2, 3 and 4 processes (gloo), compared with one process in fp64.

The ranks of each world size W run every case in a single launch (tests/support/sharded.py); the tests here check the
results.
"""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastclip
from fastclip.parity.promised import LOSS, SCALE_GRADIENT
from fastclip.parity.truth import Truth, truth
from support import sharded
from support.accuracy import check_gradient, unit_roundoff
from support.once import once
from support.sharded import COMMS, FAULT_SECONDS, SCALE, Batch, Encoders, accuracy_cases, samples

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks are forked")
WORLDS = (1, 2, 3, 4)


@functools.cache
def ranks(W: int, *fault: str) -> list[Any]:
    """Return the results of every rank, None for a rank that left none."""
    folder = once(" ".join(["ranks", str(W), *fault]), lambda folder: start(folder, W, *fault))
    paths = [folder / f"{rank}.pt" for rank in range(W)]
    return [torch.load(path, weights_only=True) if path.exists() else None for path in paths]


def start(folder: Path, W: int, *fault: str) -> None:
    command = [sys.executable, sharded.__file__, str(W), str(folder), *fault]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


@pytest.fixture(params=WORLDS, ids=lambda W: f"W={W}")
def W(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(params=WORLDS[1:], ids=lambda W: f"W={W}")
def several(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@functools.cache
def whole(shards: str, options: str, dtype: str, W: int) -> tuple[Batch, Truth]:
    batch = Batch(shards, options, dtype, W)
    return batch, truth(batch.image, batch.text, SCALE, **batch.truth_options())


@pytest.mark.parametrize("case", accuracy_cases(), ids="-".join)
def test_loss_and_gradients_accurate(case: tuple[str, str, str, str], W: int) -> None:
    """The mean over ranks is the loss of the batch and its gradient with respect to the scalars. The gradients of a
    rank's features are W times those of the batch. In 16 bits, they are rounded by each rank that adds to them, and
    once at the end.
    """
    batch, expected = whole(*case[1:], W)
    if not sum(batch.sizes):
        pytest.skip("no rank has a row")
    found = [of_rank["accuracy"][case] for of_rank in ranks(W)]
    losses, images, texts, *scalars = zip(*found)
    loss = torch.stack(losses).double().mean()
    size = SCALE * 2.0**-21 if batch.options.get("label_smoothing") else 0.0
    assert abs(float(loss) - float(expected.loss)) <= LOSS * float(expected.loss) + size
    for name, shards in (("d_image", images), ("d_text", texts)):
        ours = torch.cat(shards)
        true, sums = (W * getattr(expected, name + end) for end in ("", "_sum"))
        roundings = 3 if batch.options.get("label_smoothing") else 2
        check_gradient(name, ours, true, sums, [], 1.0, roundings)
    for name, values in zip(("d_scale", "d_bias"), scalars):
        true, sums = float(getattr(expected, name)), float(getattr(expected, name + "_sum"))
        budget = SCALE_GRADIENT * abs(true) + max(2.0**-21, unit_roundoff(batch.image.dtype)) * sums
        assert abs(float(torch.stack(values).double().mean()) - true) <= budget


@pytest.mark.parametrize("options", sharded.OPTIONS)
@pytest.mark.parametrize("comm", COMMS)
def test_exact_in_fp64(comm: str, options: str, W: int) -> None:
    _, expected = whole("unequal", options, "float64", W)
    found = [of_rank["exact"][comm, options] for of_rank in ranks(W)]
    losses, images, texts, *scalars = zip(*found)
    logits = 1e4 if options == "not normalised" else 1  # such logits are large: the truth's softmax - 1 has lost digits
    torch.testing.assert_close(torch.stack(losses).mean(), expected.loss, rtol=1e-13, atol=1e-14 * logits)
    torch.testing.assert_close(
        torch.stack(scalars[0]).mean(), expected.d_scale, rtol=1e-13 * logits, atol=1e-14 * logits
    )
    for ours, true in zip((images, texts), (expected.d_image, expected.d_text)):
        error = (torch.cat(ours) - W * true).norm() / (W * true).norm()
        assert error < 1e-14 * logits


@pytest.mark.parametrize("case", ["equal_shards", "repeatable", "delays"])
def test_bits_do_not_depend(case: str, W: int) -> None:
    """The bits of loss and gradients do not depend on the promise of equal shards, on the run, or on ranks that fall
    behind in the ring.
    """
    if W == 1 and case == "delays":
        pytest.skip("nothing travels")
    assert all(of_rank[case] for of_rank in ranks(W))


@pytest.mark.parametrize("case", ["sums", "sigmoid_sums"])
def test_sum(case: str, W: int) -> None:
    batch = Batch("unequal", "labels" if case == "sums" else "sigmoid", "float64", W)
    one = batch_without_ranks(batch, reduction="sum")
    for k in range(len(COMMS)):
        value, image, text, *scalars = zip(*(of_rank[case][k] for of_rank in ranks(W)))
        torch.testing.assert_close(torch.stack(value).mean(), one[0])
        for ours, true in zip((torch.cat(image), torch.cat(text)), one[1:3]):
            torch.testing.assert_close(ours, W * true)
        for ours, true in zip(scalars, one[3:]):
            torch.testing.assert_close(torch.stack(ours).mean(), true)


@pytest.mark.parametrize("options", ["plain", "labels", "not normalised"])
@pytest.mark.parametrize("comm", COMMS)
def test_ranks_leave_out_the_pairs_of_one_process(comm: str, options: str, W: int) -> None:
    batch = Batch("unequal", options, "float64", W)
    one = batch_without_ranks(batch, negative_margin=-0.1)
    assert one[0] != batch_without_ranks(batch)[0], "no pair is left out"
    value, image, text, scale = zip(*(of_rank["margins"][comm, options] for of_rank in ranks(W)))
    for ours, true in zip((torch.cat(image), torch.cat(text)), one[1:3]):
        torch.testing.assert_close(ours, W * true)
    for ours, true in zip((value, scale), (one[0], one[3])):
        torch.testing.assert_close(torch.stack(ours).mean(), true)


def batch_without_ranks(batch: Batch, **options: Any) -> list[Tensor]:
    batch.own = slice(None)
    return sharded.sharded(batch, None, **options)


def labels_of(batch: Batch) -> dict[str, Tensor]:
    return {} if batch.labels is None else dict(zip(("image_labels", "text_labels"), batch.labels))


def test_none_is_the_ranks_own_losses(W: int) -> None:
    batch = Batch("unequal", "labels", "float64", W)
    one = fastclip.contrastive_loss(batch.image, batch.text, SCALE, reduction="none", **labels_of(batch))
    for k in range(len(COMMS)):
        for ours, true in zip(zip(*(of_rank["none"][k] for of_rank in ranks(W))), one):
            torch.testing.assert_close(torch.cat(ours), true)


@pytest.mark.parametrize(("k", "options"), [*enumerate(("plain", "labels", "self pairs", "not normalised"))])
def test_stats(k: int, options: str, W: int) -> None:
    batch = Batch("unequal", options, "float64", W)
    one = fastclip.contrastive_stats(batch.image, batch.text, SCALE, **batch.options, **labels_of(batch))
    for name, ours, true in zip(one._fields, zip(*(of_rank["stats"][k] for of_rank in ranks(W))), one):
        torch.testing.assert_close(torch.cat(ours), true, msg=lambda text, name=name: f"{name}: {text}")


def test_multiview(W: int) -> None:
    batch = Batch("unequal", "plain", "float64", W)
    views = batch.image, batch.text, batch.image.flip(1)
    one = sharded.run(lambda *x: fastclip.multiview_loss(x, SCALE), *views)
    value, *grads = zip(*(of_rank["multiview"] for of_rank in ranks(W)))
    torch.testing.assert_close(torch.stack(value).mean(), one[0])
    for ours, true in zip(grads, one[1:]):
        torch.testing.assert_close(torch.cat(ours), W * true)


def test_modules_are_open_clips(several: int) -> None:
    """The modules agree with open_clip: value and feature gradients on every rank, scalar gradients in their mean. The
    modes are local_loss with gather_with_grad, and every form of open_clip's sigmoid loss.
    """
    found = [of_rank["open_clip"] for of_rank in ranks(several)]
    if not found[0]:
        pytest.skip("open_clip is not installed")
    assert len(found[0][0]) == 5
    for ours, theirs in found:
        for a, b in zip(ours, theirs):
            for x, y in zip(a[:3], b[:3]):
                torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)
    for k in range(len(found[0][0])):
        for scalar in range(3, len(found[0][0][k])):
            ours, theirs = (torch.stack([f[who][k][scalar] for f in found]).mean() for who in (0, 1))
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_modules_refuse_another_world(W: int) -> None:
    for of_rank in ranks(W):
        for error in of_rank["module_of_another_world"]:
            assert error.startswith("ValueError: rank=") and "default group" in error


def test_training_with_ddp_is_the_single_process(W: int) -> None:
    """DDP's mean of the gradients is the gradient of the batch: three steps of encoders and logit_scale with unequal
    shards, in both forms of the loss.
    """
    model = Encoders()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(3):
        rows = samples(step, W)
        optimizer.zero_grad()
        fastclip.contrastive_loss(*model(rows)).backward()
        optimizer.step()
    for of_rank in ranks(W):
        for ours, true in zip(of_rank["training"], model.parameters()):
            torch.testing.assert_close(ours, true.detach(), rtol=1e-11, atol=1e-12)


def test_second_derivatives_on_the_reference(W: int) -> None:
    """The reference has second derivatives over ranks, here of the sum of all squared gradients. The ring has none and
    raises.
    """
    batch = Batch("unequal", "plain", "float64", W)
    inputs = [x.clone().requires_grad_() for x in (batch.image, batch.text)]
    loss = W * fastclip.contrastive_loss(*inputs, SCALE, backend="reference")
    first = torch.autograd.grad(loss, inputs, create_graph=True)
    true = torch.autograd.grad(sum(d.square().sum() for d in first), inputs)
    found = [of_rank["second_derivatives"] for of_rank in ranks(W)]
    for k in range(2):
        torch.testing.assert_close(torch.cat([grads[k] for grads, _ in found]), true[k])
    for _, errors in found:
        for error in errors:
            assert "comm='ring' has no second derivatives" in error


def test_compiled() -> None:
    """The compiled loss equals the uncompiled one, as one graph with equal_shards=True, and otherwise as two graphs
    around the exchange.
    """
    for of_rank in ranks(2):
        for plain, compiled in of_rank["compiled"]:
            assert len(plain) == len(compiled)
            for a, b in zip(plain, compiled):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_compiled_order() -> None:
    """A compiler may reorder independent operations; compiled and uncompiled ranks still exchange in the same order.
    Smoothing with labels takes 8 collectives. Limits without normalisation take 6, one of them for both largest norms.
    """
    for of_rank in ranks(2):
        plain, compiled, graphs = of_rank["compiled_order"]
        assert plain == compiled and len(plain) == 8 + 6
        assert graphs == ranks(2)[0]["compiled_order"][2] <= 2


@pytest.mark.parametrize("k", range(3))
def test_added_on_the_way(k: int, W: int) -> None:
    """NCCL's way of summing the texts' gradients (padded, in fp32) gives the same result; it runs here with gloo."""
    for of_rank in ranks(W):
        plain, added = of_rank["added_on_the_way"][k]
        torch.testing.assert_close(added, plain, rtol=1e-6 if k < 2 else 2e-2, atol=1e-6)


def test_equal_shards_are_not_empty(W: int) -> None:
    for of_rank in ranks(W):
        for error in of_rank["empty_batches"]:
            assert error.startswith("ValueError: features must not be empty: image_features (0, 8)")


def test_autocast(W: int) -> None:
    """Features are exchanged and multiplied in autocast's dtype."""
    for of_rank in ranks(W):
        gather, ring, rounded = of_rank["autocast"]
        assert torch.equal(gather, rounded) and torch.allclose(ring, rounded, rtol=1e-6)


def test_a_rank_multiplies_its_share(W: int) -> None:
    """Each rank takes 8 M N D / W operations of the softmax loss, or 6 M N D / W of the sigmoid loss. The CPU's
    backward pass reuses the last block of products of its forward pass after a gather, and here that block is all of
    them.
    """
    N = 150 * W
    unit = N * N * 72 // W
    for of_rank in ranks(W):
        assert of_rank["operations"] == [k * unit for k in (6, 6, 6, 8, 8, 6)]


def test_ring_holds_few_texts(several: int) -> None:
    """The ring holds at most 6 matrices of a rank's size (texts and their gradients) at a time, for any number of
    ranks. A gather holds all of them twice.
    """
    for of_rank in ranks(several):
        most = of_rank["texts_at_a_time"]
        assert most["ring"] <= 6 * 150
        assert most["gather"] >= 2 * several * 150


REFUSED = {
    "D": "disagree on features' D: ",
    "dtype": "disagree on features' dtype: ",
    "logit_scale": "disagree on logit_scale: ",
    "label_smoothing": "disagree on label_smoothing: ",
    "comm": "disagree on comm: ",
    "labels": "disagree on labels: ",
    "requires_grad": "disagree on requires_grad: ",
    "function": "disagree on function: ",
    "pairs": "there must be as many texts as images: image_features (4, 8) float32 on cpu and text_features (3, 8)",
    "image_weight": "image_weight must be in [0, 1], got 2.0",
    "backend": "backend='cuda' cannot serve this call",
    "views": "views must have one shape, dtype and device: views[0] (4, 8) float32 on cpu and views[2] (3, 8)",
    "comm of its own": "comm must be 'gather' or 'ring', got 'tree'",
    "workspace": "FASTCLIP_WORKSPACE_MB must be a number of MiB above 0, got 'lots'",
    "empty": "features must not be empty: no rank has an image",
    "no positive": "no image label equals a text label",
}
# Arguments that are wrong on their own
OWN = dict.fromkeys(("pairs", "image_weight", "views", "comm of its own", "workspace"), "ValueError")
OWN["backend"] = "RuntimeError"


@pytest.mark.fault("Arguments of the ranks disagree or are wrong", "Every rank raises an error, and none hangs")
@pytest.mark.parametrize("case", REFUSED)
def test_ranks_that_disagree_raise_everywhere(case: str, several: int) -> None:
    for rank, of_rank in enumerate(ranks(several)):
        error, seconds = of_rank["refusals"][case]
        assert REFUSED[case] in error and seconds < 5
        if case in OWN:
            mine = rank == several - 1
            told = f"{OWN[case]}: " if mine else f"ValueError: rank {several - 1} of the group refused its arguments: "
            assert error.startswith(told)
        else:
            assert error.startswith("ValueError: ")


def test_groups(several: int) -> None:
    one = batch_without_ranks(Batch("equal", "plain", "float32", 1))[0]
    for rank, of_rank in enumerate(ranks(several)):
        part, of_one, mesh, word, comm = of_rank["groups"]
        if rank:
            true = whole("unequal", "labels", "float64", several - 1)[1]
            own = Batch("unequal", "labels", "float64", several - 1, rank - 1).own
            for k in range(len(COMMS)):
                mean = torch.stack([of["groups"][0][k][0] for of in ranks(several)[1:]]).mean()
                torch.testing.assert_close(mean, true.loss, rtol=1e-12, atol=1e-13)
                for ours, of_all in zip(part[k][1:3], (true.d_image, true.d_text)):
                    torch.testing.assert_close(ours, (several - 1) * of_all[own], rtol=1e-9, atol=1e-12)
        if rank == 0:
            assert math.isclose(float(of_one), float(one), rel_tol=1e-6)
        else:
            assert of_one == "ValueError: this process is not a member of group="
        assert mesh == "True", "a mesh of one dimension is its group"
        assert word.startswith("TypeError: group must be a torch.distributed.ProcessGroup") and "got str" in word
        assert comm == "ValueError: comm must be 'gather' or 'ring', got 'tree'"


@pytest.mark.fault(
    "A rank ends or hangs while the loss is computed", "The other ranks raise an error within the timeout of the group"
)
@pytest.mark.parametrize("fault", ["ends", "stops"])
def test_a_rank_that_dies_is_an_error_of_the_others(fault: str) -> None:
    """A rank that exits in the middle of the ring, or is stopped before a gather, becomes an error on the other ranks
    within the group's timeout.
    """
    first, _, last = ranks(3, fault)
    for error, seconds in (first, last):
        assert error.startswith("RuntimeError") or "Error: " in error, error
        assert error != "nothing raised" and seconds < FAULT_SECONDS + 4


def test_every_case_is_looked_at() -> None:
    source = Path(__file__).read_text()
    missing = [name for name in sharded.CASES if f'"{name}"' not in source]
    assert missing == []
