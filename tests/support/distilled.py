"""Run the ranks of tests/distributed/test_distillation.py.

    python tests/support/distilled.py W FOLDER        writes the results to FOLDER/rank.pt

The processes are forked, so that torch is imported once, and meet at a file of FOLDER.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # for a run as a program
import fastclip
from support.accuracy import counted_products, pairs
from support.processes import join_group

SHARDS = {"equal": [6, 6, 6, 6], "unequal": [7, 0, 3, 5], "large": [150, 150, 150, 150]}
CASES = [("equal", torch.float32), ("unequal", torch.float32), ("unequal", torch.float64), ("large", torch.bfloat16)]
SCALE, TEACHER_SCALES = 7.0, [12.0, 4.0]
OPTIONS = {"image_weight": 0.3}


def whole(shards: str, W: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the features of the student, then of both teachers, of all ranks."""
    N = sum(SHARDS[shards][:W])
    return tuple(x.to(dtype) for D, seed in ((10, 1), (6, 2), (16, 3)) for x in pairs(N, N, D, seed=seed))


def run(loss: Any, image: Tensor, text: Tensor) -> list[Tensor]:
    """Return a value and the gradients of features and scale."""
    wide = torch.promote_types(image.dtype, torch.float32)
    leaves = [x.clone().requires_grad_() for x in (image, text, torch.tensor(SCALE, dtype=wide))]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


class Rank:
    """A rank's cases; each returns what is stored under its name."""

    def __init__(self, rank: int, W: int) -> None:
        self.rank, self.W, self.group = rank, W, dist.group.WORLD

    def features(self, shards: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        sizes = SHARDS[shards][: self.W]
        return tuple(x.split(sizes)[self.rank] for x in whole(shards, self.W, dtype))

    def loss(self, shards: str, dtype: torch.dtype, function: Any = None, **options: Any) -> list[Tensor]:
        image, text, a, b, c, d = self.features(shards, dtype)
        function = function or fastclip.distillation_loss
        options = {"group": self.group, **OPTIONS, **options}
        return run(lambda *x: function(*x, [a, c], [b, d], TEACHER_SCALES, **options), image, text)

    def accuracy(self) -> list[Any]:
        return [self.loss(*case) if sum(SHARDS[case[0]][: self.W]) else None for case in CASES]

    def none(self) -> list[Tensor]:
        image, text, a, b, c, d = self.features("unequal", torch.float64)
        options = {"group": self.group, "reduction": "none"}
        return list(fastclip.distillation_loss(image, text, SCALE, [a, c], [b, d], TEACHER_SCALES, **options))

    def same_bits(self) -> bool:
        """Return True if the promise of equal shards changes no bit, and a compiled call none beyond rounding."""
        plain = self.loss("equal", torch.float32)
        promised = self.loss("equal", torch.float32, equal_shards=True)
        compiled = torch.compile(fastclip.distillation_loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(self.loss("equal", torch.float32, compiled, equal_shards=True), plain)
        return all(torch.equal(a, b) for a, b in zip(plain, promised))

    def operations(self) -> int:
        with pytest.MonkeyPatch.context() as patch:
            counted = counted_products(patch)
            self.loss("large", torch.float32)
            return sum(counted)

    def open_clip(self) -> list[list[Tensor]]:
        """Return results of fastclip's and open_clip's module with the same arguments on normalised features."""
        if (theirs := sys.modules.get("open_clip.loss")) is None:  # not installed
            return []
        image, text, a, b, *_ = (torch.nn.functional.normalize(x, dim=1) for x in self.features("equal", torch.float64))
        options = {"local_loss": True, "gather_with_grad": True, "rank": self.rank, "world_size": self.W}
        found = []
        for kind in (fastclip.DistillClipLoss, theirs.DistillClipLoss):
            module = kind(**options)
            for k in range(2):
                found.append(run(lambda *x, k=k, module=module: module(*x, a, b, 12.0)[k], image, text))
        return found

    def refusals(self) -> dict[str, str]:
        """Return the errors of wrong arguments of the last rank."""
        last = self.rank == self.W - 1
        x, y = torch.randn(4, 8), torch.randn(4, 5)
        calls = {
            "scale": lambda: (x, x, SCALE, y, y, 3.0 + last),
            "D": lambda: (x, x, SCALE, y[:, : 5 - last], y[:, : 5 - last], 3.0),
            "rows": lambda: (x, x, SCALE, y[: 4 - last], y[: 4 - last], 3.0),
        }
        found = {}
        for name, call in calls.items():
            with pytest.raises(ValueError) as error:
                fastclip.distillation_loss(*call(), group=self.group)
            found[name] = str(error.value)
        return found


def work(rank: int, W: int, folder: str) -> None:
    torch.set_num_threads(1)
    join_group(rank, W, folder)
    one = Rank(rank, W)
    names = ["accuracy", "none", "same_bits", "operations"] + ["open_clip", "refusals"] * (W > 1)
    torch.save({name: getattr(one, name)() for name in names}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    ranks, place = int(sys.argv[1]), sys.argv[2]
    with contextlib.suppress(ImportError):
        importlib.import_module("open_clip.loss")  # before the fork, because it takes seconds
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank, ranks, place)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))
