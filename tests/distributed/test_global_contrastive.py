"""The global contrastive loss over the shards of 2 and 3 processes (gloo), compared with one process in fp64."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fastclip
from fastclip.parity.promised import FP64
from support.accuracy import pairs
from support.once import once
from support.processes import join_group
from support.sharded import COMMS, refused

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks are forked")
SAMPLES, STEPS, D = 20, 4, 10
SHARDS = {2: [5, 4], 3: [4, 0, 5]}


def batch(step: int, own: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a shard of a step's batch of 9 pairs. The first and the last pair, of different ranks, are one sample."""
    image, text = (x.double() for x in pairs(9, 9, D, noise=1.0, seed=step))
    index = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(step))[:9]
    index[8] = index[0]
    scale = torch.tensor(6.0, dtype=torch.float64, requires_grad=True)
    return image[own].requires_grad_(), text[own].requires_grad_(), scale, index[own]


def run(own: slice = slice(None), **options: Any) -> tuple[list[list[Tensor]], dict[str, Tensor]]:
    """Return value and gradients of a few steps, and the state after them."""
    loss = fastclip.GlobalContrastiveLoss(SAMPLES, 0.6, rho=2.0, **options).double()
    found = []
    for step in range(STEPS):
        image, text, scale, index = batch(step, own)
        value = loss(image, text, scale, index)
        found.append([value.detach(), *torch.autograd.grad(value, (image, text, scale))])
    return found, loss.state_dict()


def work(rank: int, W: int, folder: Path) -> None:
    torch.set_num_threads(1)
    early = fastclip.GlobalContrastiveLoss(SAMPLES, 0.6, rho=2.0, group=dist.group.WORLD).double()
    join_group(rank, W, folder, seconds=120)
    group, sizes = dist.group.WORLD, SHARDS[W]
    start = sum(sizes[:rank])
    own = slice(start, start + sizes[rank])
    results: dict[str, Any] = {comm: run(own, group=group, comm=comm) for comm in COMMS}
    equal = slice(3 * rank, 3 * rank + 3)
    results["equal shards"] = [run(equal, group=group, equal_shards=promised) for promised in (False, True)]
    image, text, scale, index = batch(0, own)
    loss = fastclip.GlobalContrastiveLoss(SAMPLES, 0.5 if rank else 0.6, group=group)
    results["gammas differ"] = refused(loss, image, text, scale, index)
    results["built early"] = refused(early, image, text, scale, index)
    early.group = group
    results["group set"] = early(image, text, scale, index).detach()
    late = fastclip.GlobalContrastiveLoss(SAMPLES, 0.6, rho=2.0, group=None).double()
    results["each alone"] = late(*batch(0, equal)).isfinite()
    loss.gamma = 0.5
    results["index"] = refused(loss, image, text, scale, index if rank else index + SAMPLES)
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(params=SHARDS, ids=lambda W: f"W={W}")
def ranks(request: pytest.FixtureRequest) -> list[Any]:
    """Return the results of every rank."""
    W = request.param

    def start(folder: Path) -> None:
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=work, args=(rank, W, folder)) for rank in range(W)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(200)
        assert [process.exitcode for process in processes] == [0] * W

    folder = once(f"global loss of {W} ranks", start)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(W)]


@pytest.mark.parametrize("comm", COMMS)
def test_ranks_compute_the_loss_of_the_batch(ranks: list[Any], comm: str) -> None:
    """The mean over ranks is the loss of the whole batch, with its gradients. All ranks hold the same state, bit for
    bit, which is that of one process to rounding.
    """
    expected, state = run()
    for step, true in enumerate(expected):
        values, images, texts, scales = zip(*(found[comm][0][step] for found in ranks))
        for ours, theirs in (
            (torch.stack(values).mean(), true[0]),
            (torch.cat(images) / len(ranks), true[1]),
            (torch.cat(texts) / len(ranks), true[2]),
            (torch.stack(scales).mean(), true[3]),
        ):
            assert float((ours - theirs).norm() / theirs.norm()) < FP64
    for name, x in state.items():
        assert all(torch.equal(found[comm][1][name], ranks[0][comm][1][name]) for found in ranks)
        torch.testing.assert_close(ranks[0][comm][1][name], x, rtol=1e-13, atol=1e-13)


def test_promise_of_equal_shards_changes_no_bit(ranks: list[Any]) -> None:
    for found in ranks:
        (steps, state), (promised_steps, promised_state) = found["equal shards"]
        assert all(torch.equal(x, y) for a, b in zip(steps, promised_steps) for x, y in zip(a, b))
        assert all(torch.equal(x, promised_state[name]) for name, x in state.items())


def test_every_rank_raises_the_error_of_one(ranks: list[Any]) -> None:
    assert all("the ranks of the group disagree on gamma" in found["gammas differ"] for found in ranks)
    assert "index must be from 0 to 19" in ranks[0]["index"]
    assert all("rank 0 of the group refused its arguments: ValueError: index" in found["index"] for found in ranks[1:])


def test_loss_that_was_built_before_the_group_is_refused(ranks: list[Any]) -> None:
    """torch's WORLD is None before `init_process_group`: such a loss would silently be that of one rank. It can be
    given the group later, and a loss that is built afterwards without a group is of its own rank.
    """
    for found in ranks:
        assert "RuntimeError: the loss was built before init_process_group" in found["built early"]
        assert torch.equal(found["group set"], found["gather"][0][0][0]) and found["each alone"]
