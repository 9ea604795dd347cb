"""Gradient caching that keeps the graphs of some micro-batches: the same bits, fewer forward passes."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastclip
from fastclip.training import cached_step
from support.cached import Pair, clip, cut, rows
from support.processes import join_group

COUNT = 3


def batches() -> list[tuple[Tensor, Tensor]]:
    return cut(*rows())[:COUNT]  # without the last one of a single row, which BatchNorm refuses


class Counting(Pair):
    """A model with dropout and BatchNorm that counts its forward passes with and without a graph."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5, norm=True)
        self.passes: list[bool] = []

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        self.passes.append(torch.is_grad_enabled())
        return super().forward(images, texts)


def state(model: nn.Module, value: Tensor) -> list[Tensor]:
    """Return everything that a step leaves behind."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [value, *grads, *(x.clone() for x in model.buffers()), torch.rand(1)]


def stepped(keep: int) -> tuple[list[Tensor], list[bool]]:
    torch.manual_seed(3)
    model = Counting()
    for _ in range(2):  # the second step starts from the buffers that the first has left
        value = cached_step(model, batches(), clip, keep_graphs=keep)
    return state(model, value), model.passes[len(model.passes) // 2 :]


@pytest.mark.parametrize("keep", [1, 2, COUNT - 1, COUNT, COUNT + 5])
def test_kept_graphs_change_no_bit(keep: int) -> None:
    """Loss, gradients, running statistics and the state of the generator are those of a step that keeps none."""
    none, passes = stepped(0)
    assert passes == [False] * COUNT + [True] * COUNT
    ours, passes = stepped(keep)
    kept = min(keep, COUNT)
    assert passes == [True] * kept + [False] * (COUNT - kept) + [True] * (COUNT - kept)
    for a, b in zip(ours, none, strict=True):
        assert torch.equal(a, b)


def test_kept_graphs_under_autocast() -> None:
    """Autocast around the call caches its casts of the weights, which all passes share."""

    def run(keep: int) -> list[Tensor]:
        model = Pair().float()
        cast = [[x.float() for x in batch] for batch in batches()]
        with torch.autocast("cpu", torch.bfloat16):
            value = cached_step(model, cast, lambda *x: clip(*(y.float() for y in x)), keep_graphs=keep)
        return state(model, value)

    torch.manual_seed(0)
    first = run(0)
    for keep in (2, COUNT):
        torch.manual_seed(0)
        for a, b in zip(run(keep), first, strict=True):
            assert torch.equal(a, b)


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="keep_graphs must be at least 0, got -1"):
        cached_step(Pair(), batches(), clip, keep_graphs=-1)


def sharded_grads(model: nn.Module) -> list[Tensor]:
    return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]


def work(rank: int, W: int, folder: str) -> None:
    """Compute the gradients of two steps with DDP and with FSDP2, for several numbers of kept graphs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    join_group(rank, W, folder)
    mesh = init_device_mesh("cpu", (W,))
    images, texts = (x[rank::W] for x in rows())
    pieces = list(zip(images.split(4), texts.split(4)))

    def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return fastclip.sigmoid_loss(image, text, scale, bias, group=dist.group.WORLD)

    found: dict[str, list[list[Tensor]]] = {"ddp": [], "fsdp": []}
    for keep in (0, 1, len(pieces)):
        for name, all_of_it in found.items():
            model = Counting()
            if name == "ddp":
                wrapped: Any = nn.parallel.DistributedDataParallel(model)
            else:
                numbers = {p for p in model.parameters() if p.dim() == 0}
                fully_shard(model.text, mesh=mesh)
                wrapped = fully_shard(model, mesh=mesh, ignored_params=numbers)
            torch.manual_seed(rank)
            for _ in range(2):
                value = cached_step(wrapped, pieces, loss, keep_graphs=keep)
            kept = min(keep, len(pieces) - 1)  # the last one is embedded again
            assert model.passes.count(False) == 2 * (len(pieces) - kept)
            all_of_it.append([value, *sharded_grads(model)])
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks are forked")
def test_kept_graphs_over_processes(tmp_path: Path) -> None:
    """DDP and FSDP2 exchange the same gradients, bit for bit, however many graphs each process keeps."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank, 2, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    for rank in range(2):
        for first, *others in torch.load(tmp_path / f"{rank}.pt", weights_only=True).values():
            for other in others:
                for a, b in zip(other, first, strict=True):
                    assert torch.equal(a, b)
