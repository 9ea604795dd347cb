"""Run the ranks of tests/distributed/test_distributed.py: every case of a group of W processes in one launch.

    python tests/support/sharded.py W FOLDER        writes the results to FOLDER/rank.pt
    python tests/support/sharded.py W FOLDER FAULT  ends or stops a rank in the middle; writes the errors of the others

The processes are forked, so that torch is imported once, and meet at a file of FOLDER.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import multiprocessing
import os
import random
import sys
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))  # for a run as a program
from torch import Tensor

import fastclip
from fastclip.distributed import collectives, ring
from support.accuracy import counted_products, pairs
from support.processes import join_group

SCALE = 7.0
SHARDS = {"equal": [6, 6, 6, 6], "unequal": [7, 0, 3, 5], "empty last": [0, 5, 4, 0], "large": [150, 150, 150, 150]}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weighted and smoothed": {"image_weight": 0.3, "label_smoothing": 0.1},
    "labels": {"labels": "two"},
    "labels smoothed": {"labels": "two", "label_smoothing": 0.1},
    "self pairs": {"labels": "one", "exclude_self": True, "label_smoothing": 0.1},
    "not normalised": {"normalize": False},
    "images alone": {"image_weight": 1.0},
    "images alone, self pairs": {"labels": "one", "exclude_self": True, "image_weight": 1.0},
    "texts alone": {"image_weight": 0.0},
    "texts alone, labels": {"labels": "two", "image_weight": 0.0},
    "sigmoid": {"bias": -3.0},
}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMMS = ("gather", "ring")


def accuracy_cases() -> list[tuple[str, str, str, str]]:
    """List (comm, shards, options, dtype): everything in fp32, and fewer cases for what dtypes or sizes change."""
    cases = list(itertools.product(COMMS, ("equal", "unequal", "empty last"), OPTIONS, ["float32"]))
    cases += itertools.product(COMMS, ["unequal"], OPTIONS, ["bfloat16"])
    cases += itertools.product(COMMS, ["equal", "large"], ["plain", "labels", "sigmoid"], ["bfloat16", "float16"])
    cases += itertools.product(COMMS, ["large"], ["plain", "labels"], ["float32"])
    return cases


class Batch:
    """The whole batch, and a rank's shard of it."""

    def __init__(self, shards: str, options: str, dtype: str, W: int, rank: int = 0) -> None:
        self.sizes = SHARDS[shards][:W]
        N, D = sum(self.sizes), 72 if shards == "large" else 10
        self.image, self.text = (x.to(DTYPES[dtype]) for x in pairs(N, N, D, seed=N))
        self.options = dict(OPTIONS[options])
        self.bias = self.options.pop("bias", None)
        generator = torch.Generator().manual_seed(N)
        y = torch.randint(0, max(2 * N // 3, 1), (2, N), generator=generator)
        which = self.options.pop("labels", None)
        self.labels = None if which is None else (y[0], y[0] if which == "one" else y[1])
        first = sum(self.sizes[:rank])
        self.own = slice(first, first + self.sizes[rank])

    def truth_options(self) -> dict[str, Any]:
        return {**self.options, "labels": self.labels, "bias": self.bias}


def run(loss: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Return value and gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def sharded(batch: Batch, group: Any, **options: Any) -> list[Tensor]:
    """Return fastclip's loss of this rank's shard and its gradients, including those of the scalars."""
    own = batch.own
    scalars = [SCALE] if batch.bias is None else [SCALE, batch.bias]
    wide = torch.promote_types(batch.image.dtype, torch.float32)
    inputs = [batch.image[own], batch.text[own], *(torch.tensor(x, dtype=wide) for x in scalars)]
    if batch.labels is not None:
        options |= dict(zip(("image_labels", "text_labels"), (y[own] for y in batch.labels)))
    function = fastclip.contrastive_loss if batch.bias is None else fastclip.sigmoid_loss
    return run(lambda *x: function(*x, group=group, **batch.options, **options), *inputs)


class Rank:
    """A rank's cases; each returns what is stored under its name."""

    def __init__(self, rank: int, W: int) -> None:
        self.rank, self.W, self.group = rank, W, dist.group.WORLD

    def batch(self, shards: str, options: str, dtype: str = "float32") -> Batch:
        return Batch(shards, options, dtype, self.W, self.rank)

    def accuracy(self) -> dict[Any, Any]:
        found = {}
        for case in accuracy_cases():
            comm, shards, options, dtype = case
            batch = self.batch(shards, options, dtype)
            if sum(batch.sizes):
                found[case] = sharded(batch, self.group, comm=comm)
        return found

    def exact(self, names: Any = OPTIONS, **options: Any) -> dict[Any, Any]:
        batches = {name: self.batch("unequal", name, "float64") for name in names}
        return {(c, n): sharded(batches[n], self.group, comm=c, **options) for c in COMMS for n in names}

    def margins(self) -> dict[Any, Any]:
        return self.exact(("plain", "labels", "not normalised"), negative_margin=-0.1)

    def equal_shards(self) -> bool:
        """Return True if the promise of equal shards changes no bit."""
        return all(
            torch.equal(a, b)
            for comm, options in itertools.product(COMMS, OPTIONS)
            for a, b in zip(
                sharded(self.batch("equal", options), self.group, comm=comm),
                sharded(self.batch("equal", options), self.group, comm=comm, equal_shards=True),
            )
        )

    def repeatable(self) -> bool:
        runs = [[sharded(self.batch("large", "labels"), self.group, comm=comm) for comm in COMMS] for _ in range(3)]
        return all(torch.equal(a, b) for again in runs[1:] for x, y in zip(runs[0], again) for a, b in zip(x, y))

    def sums(self, options: str = "labels") -> list[list[Tensor]]:
        batch = self.batch("unequal", options, "float64")
        return [sharded(batch, self.group, comm=comm, reduction="sum") for comm in COMMS]

    def sigmoid_sums(self) -> list[list[Tensor]]:
        return self.sums("sigmoid")

    def none(self) -> list[tuple[Tensor, ...]]:
        batch = self.batch("unequal", "labels", "float64")
        labels = dict(zip(("image_labels", "text_labels"), (y[batch.own] for y in batch.labels)))
        options = {**labels, "group": self.group, "reduction": "none"}
        inputs = batch.image[batch.own], batch.text[batch.own], SCALE
        return [fastclip.contrastive_loss(*inputs, comm=comm, **options) for comm in COMMS]

    def stats(self) -> list[tuple[Tensor, ...]]:
        found = []
        for options in ("plain", "labels", "self pairs", "not normalised"):
            batch = self.batch("unequal", options, "float64")
            if batch.labels is not None:
                batch.options |= dict(zip(("image_labels", "text_labels"), (y[batch.own] for y in batch.labels)))
            inputs = batch.image[batch.own], batch.text[batch.own], SCALE
            found.append(tuple(fastclip.contrastive_stats(*inputs, group=self.group, **batch.options)))
        return found

    def multiview(self) -> list[Tensor]:
        batch = self.batch("unequal", "plain", "float64")
        views = batch.image[batch.own], batch.text[batch.own], batch.image[batch.own].flip(1)
        return run(lambda *x: fastclip.multiview_loss(x, SCALE, group=self.group, comm="ring"), *views)

    def open_clip(self) -> list[list[list[Tensor]]]:
        """Return results of fastclip's and open_clip's modules with the same arguments on normalised features."""
        if (theirs := sys.modules.get("open_clip.loss")) is None:  # not installed
            return []
        batch = self.batch("equal", "plain", "float64")
        image, text = (F.normalize(x[batch.own], dim=1) for x in (batch.image, batch.text))
        scale, bias = torch.tensor(SCALE, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
        world = {"rank": self.rank, "world_size": self.W}
        found = []
        for module in (fastclip.ClipLoss, theirs.ClipLoss):
            found.append([run(module(local_loss=True, gather_with_grad=True, **world), image, text, scale)])
        for module, outs in zip((fastclip.SigLipLoss, theirs.SigLipLoss), found):
            for dist_impl in ("bidir", "shift", "reduce", "gather"):
                outs.append(run(module(dist_impl=dist_impl, **world), image, text, scale, bias))
        return found

    def module_of_another_world(self) -> list[str]:
        image, text = torch.randn(2, 3, 4)
        wrong = [(fastclip.ClipLoss(rank=self.rank, world_size=self.W + 1), ())]
        wrong += [(fastclip.SigLipLoss(rank=self.rank + 1, world_size=max(self.W, 2)), (0.0,))]
        return [refused(module, image, text, SCALE, *bias) for module, bias in wrong]

    def training(self) -> list[Tensor]:
        """Return the parameters (encoders, logit_scale) after three steps of DDP."""
        model = Encoders()
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for step in range(3):
            rows = samples(step, self.W)[self.rank :: self.W]  # unlike the shards; the mean is the batch's
            image, text, scale = wrapped(rows)
            optimizer.zero_grad()
            comm = COMMS[step % 2]
            fastclip.contrastive_loss(image, text, scale, group=self.group, comm=comm).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    def second_derivatives(self) -> tuple[list[Tensor], list[str]]:
        batch = self.batch("unequal", "plain", "float64")
        inputs = [x[batch.own].clone().requires_grad_() for x in (batch.image, batch.text)]

        def twice(function: Callable[..., Tensor], *scalars: float, **options: Any) -> list[Tensor]:
            loss = function(*inputs, *scalars, group=self.group, **options)
            first = torch.autograd.grad(loss, inputs, create_graph=True)
            return list(torch.autograd.grad(sum(d.square().sum() for d in first), inputs))

        # The differentiated function is the sum over ranks, as for the loss itself
        found = twice(fastclip.contrastive_loss, SCALE, backend="reference")
        errors = [refused(twice, fastclip.contrastive_loss, SCALE, comm="ring", backend="reference")]
        errors.append(refused(twice, fastclip.sigmoid_loss, SCALE, -3.0, comm="ring", backend="reference"))
        return found, errors

    def compiled(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Return pairs of results: not compiled, and compiled."""
        found = []
        cases = [("gather", "weighted and smoothed", True), ("gather", "labels", False), ("gather", "sigmoid", True)]
        for comm, options, whole in (*cases, ("ring", "labels", True), ("ring", "sigmoid", False)):
            torch._dynamo.reset()
            batch = self.batch("equal", options)
            plain = sharded(batch, self.group, comm=comm, equal_shards=True)
            found.append((plain, self.compiled_once(batch, comm, whole)))
        return found

    def compiled_once(self, batch: Batch, comm: str, whole: bool, backend: str = "aot_eager") -> list[Tensor]:
        """Compile one graph with equal_shards=True, otherwise one before the exchange and one after it."""
        names = ("contrastive_loss", "sigmoid_loss")
        real = [getattr(fastclip, name) for name in names]
        try:
            for name, function in zip(names, real):
                setattr(fastclip, name, torch.compile(function, fullgraph=whole, backend=backend))
            return sharded(batch, self.group, comm=comm, equal_shards=whole)
        finally:
            for name, function in zip(names, real):
                setattr(fastclip, name, function)

    def compiled_order(self) -> list[Any]:
        """Return the collectives of a step as written and as inductor orders them, and the graphs for four sizes."""
        called: list[str] = []

        def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **options: (called.append(f"{name} {args[0].dtype}"), real(*args, **options))[1]

        batches, orders = [self.batch("equal", name) for name in ("labels smoothed", "not normalised")], []
        batches[1].options["negative_margin"] = -0.1
        torch._dynamo.reset()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(collectives, "all_gather", watched("all_gather", collectives.all_gather))
            for name in ("all_to_all_single", "all_reduce"):
                patch.setattr(dist, name, watched(name, getattr(dist, name)))
            for is_compiled in (False, self.rank > 0):  # next to a rank that is not compiled
                called.clear()
                for batch in batches:
                    if is_compiled:
                        self.compiled_once(batch, "gather", True, "inductor")
                    else:
                        sharded(batch, self.group, equal_shards=True)
                orders.append(list(called))
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(fastclip.contrastive_loss, fullgraph=True, backend="eager")
        for size in (6, 8, 10, 12):
            image, text = torch.randn(2, size, 8).unbind(0)
            compiled(image, text, SCALE, group=self.group, equal_shards=True, label_smoothing=0.1)
        return [*orders, torch._dynamo.utils.counters["stats"]["unique_graphs"]]

    def added_on_the_way(self) -> list[list[Tensor]]:
        """Return pairs of the texts' gradients, summed as with gloo and as with NCCL."""
        found = []
        for shards, dtype in (("unequal", "float32"), ("equal", "float32"), ("unequal", "bfloat16")):
            batch = self.batch(shards, "labels", dtype)
            plain = sharded(batch, self.group)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(collectives, "_adds_on_the_way", lambda pg, x: True)
                found.append([plain[2], sharded(batch, self.group)[2]])
        return found

    def empty_batches(self) -> list[str]:
        """Return the errors of empty batches: with equal shards promised, no rank can have a row."""
        nothing = torch.randn(2, 0, 8).unbind(0)
        losses = [(fastclip.contrastive_loss, ()), (fastclip.sigmoid_loss, (0.0,))]
        return [refused(f, *nothing, SCALE, *bias, group=self.group, equal_shards=True) for f, bias in losses]

    def autocast(self) -> list[Tensor]:
        batch = self.batch("equal", "plain")
        with torch.autocast("cpu", torch.bfloat16):
            under = [sharded(batch, self.group, comm=comm)[0] for comm in COMMS]
        batch.image, batch.text = batch.image.bfloat16(), batch.text.bfloat16()
        return [*under, sharded(batch, self.group)[0]]

    def operations(self) -> list[int]:
        """Return the operations of a rank's matrix products, forward and backward together."""
        counts = []
        for comm, options in itertools.product(COMMS, ("plain", "labels", "sigmoid")):
            batch = self.batch("large", options)
            with pytest.MonkeyPatch.context() as patch:
                counted = counted_products(patch)
                sharded(batch, self.group, comm=comm)
                counts.append(sum(counted))
        return counts

    def texts_at_a_time(self) -> dict[str, int]:
        """Return the most rows of (., D) that a form's own code keeps alive together, forward and backward."""
        most = {}
        for comm in COMMS:
            batch, alive = self.batch("large", "plain"), Alive(72)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.Tensor, "new_empty", alive.watched(torch.Tensor.new_empty))
                sharded(batch, self.group, comm=comm)
            most[comm] = alive.most
        return most

    def delays(self) -> bool:
        """Return True if a ring whose ranks fall behind at random gives the same bits."""
        expected = [sharded(self.batch("unequal", options), self.group, comm="ring") for options in OPTIONS]
        dice, exchange = random.Random(self.rank), ring.Ring.exchange

        def late(*args: Any) -> Any:
            time.sleep(dice.choice([0, 0, 0.03]))
            works = exchange(*args)
            time.sleep(dice.choice([0, 0, 0.03]))
            return works

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ring.Ring, "exchange", late)
            found = [sharded(self.batch("unequal", options), self.group, comm="ring") for options in OPTIONS]
        return all(torch.equal(a, b) for x, y in zip(expected, found) for a, b in zip(x, y))

    def refusals(self) -> dict[str, tuple[str, float]]:
        """Return what a rank raises if one rank has other arguments than the rest, and after how many seconds."""
        odd = self.rank == self.W - 1
        x, y = torch.randn(2, 4, 8, requires_grad=True)
        labels = dict.fromkeys(("image_labels", "text_labels"), torch.arange(4))
        cases: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
            "D": ((x[:, :4], y[:, :4], 5.0) if odd else (x, y, 5.0), {}),
            "dtype": ((x.bfloat16(), y.bfloat16(), 5.0) if odd else (x, y, 5.0), {}),
            "logit_scale": ((x, y, 6.0 if odd else 5.0), {}),
            "label_smoothing": ((x, y, 5.0), {"label_smoothing": 0.1 if odd else 0.0}),
            "comm": ((x, y, 5.0), {"comm": "ring" if odd else "gather"}),
            "labels": ((x, y, 5.0), labels if odd else {}),
            "requires_grad": ((x, y.detach() if odd else y, 5.0), {}),
            "pairs": ((x, y[:3] if odd else y, 5.0), {}),
            "image_weight": ((x, y, 5.0), {"image_weight": 2.0 if odd else 0.5}),
            "backend": ((x, y, 5.0), {"backend": "cuda" if odd else None}),
            "workspace": ((x, y, 5.0), {}),
            "empty": ((x[:0], y[:0], 5.0), {}),
            "no positive": ((x, y, 5.0), {**labels, "text_labels": torch.arange(4) + 10}),
        }
        found = {}
        for name, (args, options) in cases.items():
            start = time.monotonic()
            with pytest.MonkeyPatch.context() as patch:
                if name == "workspace" and odd:
                    patch.setenv("FASTCLIP_WORKSPACE_MB", "lots")
                error = refused(fastclip.contrastive_loss, *args, group=self.group, **options)
            found[name] = error, time.monotonic() - start
        views = x, y, x[:3] if odd else x
        found["views"] = refused(fastclip.multiview_loss, views, 5.0, group=self.group), 0.0
        found["comm of its own"] = (
            refused(fastclip.contrastive_loss, x, y, 5.0, group=self.group, comm="tree" if odd else "ring"),
            0.0,
        )
        found["function"] = (
            refused(
                *((fastclip.sigmoid_loss, x, y, 5.0, 0.0) if odd else (fastclip.contrastive_loss, x, y, 5.0)),
                group=self.group,
            ),
            0.0,
        )
        return found

    def groups(self) -> list[Any]:
        """Return results for a part of the ranks, a mesh, and values that are not groups."""
        others = dist.new_group(list(range(1, self.W)))  # its ranks differ from the world's
        part = [None, None]
        if self.rank:
            batch = Batch("unequal", "labels", "float64", self.W - 1, self.rank - 1)
            part = [sharded(batch, others, comm=comm) for comm in COMMS]
        alone = dist.new_group([0])
        batch = self.batch("equal", "plain")
        of_one = sharded(Batch("equal", "plain", "float32", 1), alone)[0] if self.rank == 0 else None
        told = str(float(of_one)) if of_one is not None else refused(sharded, batch, alone)
        mesh = dist.device_mesh.init_device_mesh("cpu", (self.W,))
        same = torch.equal(sharded(batch, mesh)[0], sharded(batch, self.group)[0])
        return [
            part,
            told,
            str(same),
            refused(sharded, batch, "world"),
            refused(sharded, batch, self.group, comm="tree"),
        ]


class Alive:
    """A counter of the rows of living tensors with D columns."""

    def __init__(self, D: int) -> None:
        self.D, self.rows, self.most = D, 0, 0

    def watched(self, real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def new_empty(x: Tensor, *size: Any, **options: Any) -> Tensor:
            made = real(x, *size, **options)
            if made.dim() == 2 and made.shape[1] == self.D:
                rows = len(made)
                self.rows += rows
                self.most = max(self.most, self.rows)
                weakref.finalize(made, self.gone, rows)
            return made

        return new_empty

    def gone(self, rows: int) -> None:
        self.rows -= rows


def refused(function: Callable[..., Any], *args: Any, **options: Any) -> str:
    try:
        function(*args, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


class Encoders(torch.nn.Module):
    """Two linear encoders and the scale as CLIP learns it, in fp64."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        weights = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
        self.image, self.text = (torch.nn.Parameter(w) for w in weights)
        self.log_scale = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return rows[:, :6] @ self.image, rows[:, 6:] @ self.text, self.log_scale.exp()


def samples(step: int, W: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4 * W + (W - 1) // 2, 12, generator=generator, dtype=torch.float64)


CASES = [name for name in vars(Rank) if not name.startswith("_") and name not in ("batch", "compiled_once")]
# Compiling takes seconds. A single rank exchanges nothing and cannot disagree with another
WORLDS = {"compiled": [2], "compiled_order": [2]}
WORLDS |= {name: [2, 3, 4] for name in ("refusals", "delays", "groups", "open_clip")}
FAULT_SECONDS = 2.0  # the group's timeout if a rank ends or stops


def work(rank: int, W: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    join_group(rank, W, folder, seconds=300)  # a rank waits while another compiles
    cases = Rank(rank, W)
    found = {name: getattr(cases, name)() for name in CASES if W in WORLDS.get(name, [W])}
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def work_with_fault(rank: int, W: int, folder: Path, fault: str) -> None:
    """Run a loss in which rank 1 ends in the ring's second step, or stops before it joins a gather."""
    torch.set_num_threads(1)
    join_group(rank, W, folder, FAULT_SECONDS)
    batch = Batch("equal", "plain", "float32", W, rank)
    sharded(batch, dist.group.WORLD, comm="ring")
    dist.barrier()
    if fault == "ends" and rank == 1:
        blocks = ring.Ring.blocks
        ring.Ring.blocks = lambda *args: (os._exit(0) if k else block for k, block in enumerate(blocks(*args)))
    if fault == "stops" and rank == 1:
        time.sleep(3 * FAULT_SECONDS)
    start = time.monotonic()
    error = refused(sharded, batch, dist.group.WORLD, comm="ring" if fault == "ends" else "gather")
    torch.save((error, time.monotonic() - start), folder / f"{rank}.pt")
    os._exit(0)  # a regular exit would wait for ranks that no longer answer


def main() -> None:
    W, folder = int(sys.argv[1]), Path(sys.argv[2])
    if len(sys.argv) == 3 and W > 1:
        with contextlib.suppress(ImportError):
            importlib.import_module("open_clip.loss")  # before the fork, because it takes seconds
    context = multiprocessing.get_context("fork")
    target = (work_with_fault, *sys.argv[3:]) if len(sys.argv) > 3 else (work,)
    processes = [context.Process(target=target[0], args=(rank, W, folder, *target[1:])) for rank in range(W)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))


if __name__ == "__main__":
    main()
