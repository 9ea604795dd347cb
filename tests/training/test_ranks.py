"""Two processes train as one: DistributedDataParallel and FSDP2 on gloo."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import fastclip
from fastclip.parity.promised import LOSS
from support import needs
from support.once import once
from support.processes import join_group

needs("train")

from fastclip.models import create_model
from fastclip.training import TrainOptions, cached_step, from_options, train, trainer
from fastclip.training.ranks import World, wrap
from fastclip.training.step import compiled
from fastclip.training.step.moving_average import MovingAverage
from fastclip.training.step.optim import build_optimizer
from support.digits_run import digits_run

W, STEPS = 2, 5
# Additional options of each run. A single process with the same options, without compilation, has the same losses and,
# to rounding, the same model.
CASES: dict[str, dict[str, Any]] = {
    "ddp": {"val_data": "digits"},
    "ddp, micro-batches, ring": {"micro_batch": 5, "comm": "ring", "loss": "siglip"},
    "ddp, global, micro-batches": {"loss": "global", "micro_batch": 90, "batch_size": 720},
    "ddp, unequal shards": {"batch_size": 25, "micro_batch": 7, "prefixes": (16, 64)},
    "ddp, one rank without caching, locked": {"batch_size": 25, "micro_batch": 12, "lock_image": True},
    "fsdp": {"parallel": "fsdp"},
    "fsdp, averaged, validated": {"parallel": "fsdp", "ema": 0.9, "val_data": "digits", "val_every": 2},
    "fsdp, micro-batches": {"parallel": "fsdp", "micro_batch": 5, "ema": 0.9, "max_grad_norm": 0.5},
    "fsdp, lamb": {"parallel": "fsdp", "optimizer": "lamb", "lr": 1e-3, "grad_checkpointing": True},
    "fsdp, locked": {"parallel": "fsdp", "lock_image": True, "micro_batch": 5},
    "ddp, compiled": {"compile": True, "micro_batch": 5, "grad_checkpointing": True},
    "fsdp, compiled": {"compile": True, "micro_batch": 5, "parallel": "fsdp"},
}


def options(folder: Path, **changed: Any) -> TrainOptions:
    return digits_run(folder, **{"max_steps": STEPS, **changed})


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    compiled._BACKEND = "eager"  # generating code takes a minute
    join_group(rank, W, folder)
    for name, changed in CASES.items():
        run = train(options(folder / name, **changed))
        (folder / f"{name} {rank}.json").write_text(json.dumps([run.losses, run.validation]))
    # A run resumes from two shards as two whole models, and vice versa; see also the test below.
    for name, other in (("fsdp", "ddp"), ("ddp", "fsdp")):
        changed = {"parallel": other, "resume": str(folder / name), "max_steps": STEPS + 2}
        run = train(options(folder / f"{name} as {other}", **changed))
        (folder / f"{name} as {other} {rank}.json").write_text(json.dumps([run.losses, run.validation]))
    run = train(options(folder / "statistics", model="RN-tiny", val_data="digits", max_steps=2))
    (folder / f"statistics {rank}.json").write_text(json.dumps([run.losses, run.validation]))
    try:
        train(options(folder / "counts", parallel="fsdp", batch_size=25, micro_batch=12))
    except ValueError as error:
        (folder / f"counts {rank}.json").write_text(json.dumps(str(error)))
    (folder / f"lamb {rank}.json").write_text(json.dumps(lamb_of_shards(rank)))
    (folder / f"reads {rank}.json").write_text(json.dumps(reads_a_shard()))
    (folder / f"obstacle {rank}.json").write_text(json.dumps(one_rank_cannot_compile(rank, folder)))
    dist.destroy_process_group()


def no_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("no memory")


def one_rank_cannot_compile(rank: int, folder: Path) -> tuple[str, list[float]]:
    """Return the error of a run with --compile of which rank 1 cannot compile, and the losses of one by default."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "untraceable", lambda *_: "no trace" if rank == 1 else None)
        patch.setattr(from_options, "_COMPILED", ("cpu",))
        with pytest.raises(ValueError) as refused:
            train(options(folder / "obstacle", compile=True))
        patch.setattr(trainer, "untraceable", no_memory if rank == 1 else lambda *_: None)
        with pytest.raises(RuntimeError, match="no memory"):
            train(options(folder / "obstacle", compile=True))
        patch.setattr(trainer, "untraceable", lambda *_: "no trace" if rank == 1 else None)
        return str(refused.value), train(options(folder / "obstacle by default")).losses


def lamb_of_shards(rank: int) -> float:
    """Return how far LAMB that processes all shards together, as on a GPU, is from one that takes them one by one."""
    ends = []
    for together in (False, True):
        torch.manual_seed(0)
        model = create_model("ViT-tiny", context_length=16)
        wrap(model, World(rank, W, torch.device("cpu"), dist.group.WORLD), "fsdp")
        optimizer = build_optimizer("lamb", model, lr=1e-2, weight_decay=0.1)
        average = MovingAverage(model, 0.9)
        for group in optimizer.param_groups:
            group["foreach"] = together
        for k in range(5):
            for p in model.parameters():
                p.grad = (p.detach() + k).cos()
            optimizer.step()
            average.update()
        average.swap()
        ends.append([p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()])
    return max(float((a - b).detach().norm() / (a.detach().norm() + 1e-6)) for a, b in zip(*ends))


def reads_a_shard() -> str:
    """Return the error of a loss that gathers a parameter itself, in which each rank would keep only its shard's
    gradient.
    """
    from torch.distributed import fsdp  # slow to load

    model = torch.nn.Bilinear(3, 3, 2)
    fsdp.fully_shard(model, reshard_after_forward=True)

    def loss(image: Tensor, text: Tensor) -> Tensor:
        return fastclip.contrastive_loss(image, text, model.bias.full_tensor().sum().exp(), group=dist.group.WORLD)

    x = torch.ones(4, 3)
    try:
        cached_step(lambda a, b: (model(a, b), model(b, a)), [(x, x)], loss, modules=[model])
    except ValueError as error:
        return str(error)
    return "nothing raised"


def start_ranks(folder: Path) -> None:
    for name in ("torch._dynamo", "torch.distributed.fsdp", "sklearn.datasets", "timm"):
        importlib.import_module(name)  # once, before the fork
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank, folder)) for rank in range(W)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(400)
    assert [process.exitcode for process in processes] == [0] * W


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    if not hasattr(os, "fork"):
        pytest.skip("the ranks are forked")
    folder = once("trained by ranks", start_ranks)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield folder
    torch.set_num_threads(threads)


def of_rank(folder: Path, name: str, rank: int) -> Any:
    return json.loads((folder / f"{name} {rank}.json").read_text())


def assert_near(ours: list[float], theirs: list[float]) -> None:
    assert len(ours) == len(theirs) > 0
    for step, (a, b) in enumerate(zip(ours, theirs)):
        assert abs(a - b) <= LOSS * abs(b), f"loss of step {step}: {a} and {b}, {abs(a - b) / abs(b):.1e} apart"


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one(folder: Path, name: str, tmp_path: Path) -> None:
    (losses, validation), other = (of_rank(folder, name, rank) for rank in range(W))
    assert [losses, validation] == other  # every rank reports the whole batch
    alone = train(options(tmp_path, **{**CASES[name], "compile": False}))
    assert_near(losses, alone.losses)
    ours, theirs = (create_model(pretrained=path / "model").state_dict() for path in (folder / name, tmp_path))
    for key, x in theirs.items():
        assert float((ours[key] - x).norm()) <= 1e-3 * float(x.norm()) + 1e-6, key
    assert ("zero_shot_top1" in validation) == ("val_data" in CASES[name])
    if validation:
        assert validation["zero_shot_top1"] == pytest.approx(alone.validation["zero_shot_top1"], abs=0.02)


@pytest.mark.fault(
    "A run resumes with another number of processes, or with DDP instead of FSDP2",
    "The losses are the same up to rounding",
)
@pytest.mark.parametrize("name", ["fsdp as ddp", "ddp as fsdp"])
def test_checkpoint_fits_every_number_of_ranks(folder: Path, name: str, tmp_path: Path) -> None:
    losses, _ = of_rank(folder, name, 0)
    resumed = {"resume": str(folder / name.split()[0]), "max_steps": STEPS + 2}
    assert_near(losses, train(options(tmp_path, **resumed)).losses)


def test_model_with_statistics_is_validated_as_it_is_saved(folder: Path) -> None:
    """A model with BatchNorm is validated with the statistics that are saved, those of rank 0."""
    from fastclip.data.spec import open_source
    from fastclip.evaluation.validate import validate
    from fastclip.models import get_tokenizer, load_image_transform

    found = [of_rank(folder, "statistics", rank) for rank in range(W)]
    assert found[0] == found[1]
    name = str(folder / "statistics" / "model")
    model = create_model(pretrained=name).eval()
    again = validate(model, open_source("digits", held_out=True), load_image_transform(name), get_tokenizer(name))
    assert again == pytest.approx(found[0][1], abs=0.02)


def test_fsdp_with_unequal_numbers_of_micro_batches_is_refused(folder: Path) -> None:
    told = {of_rank(folder, "counts", rank) for rank in range(W)}
    assert len(told) == 1 and "the 2 processes have 1 or 2 micro-batches of 12" in told.pop()


def test_loss_that_reads_a_shard_by_itself_is_refused(folder: Path) -> None:
    for rank in range(W):
        told = of_rank(folder, "reads", rank)
        assert told.startswith("loss directly reads the parameter bias, which FSDP has sharded")


def test_one_rank_that_cannot_compile_decides_for_all(folder: Path) -> None:
    for rank in range(W):
        told, losses = of_rank(folder, "obstacle", rank)
        assert re.search(r"^--compile: .*no trace \(on rank 1\)", told)
        assert losses == of_rank(folder, "ddp", rank)[0]


def test_lamb_of_shards_takes_them_together(folder: Path) -> None:
    assert max(of_rank(folder, "lamb", rank) for rank in range(W)) < 1e-5


def _sees(rank: int, folder: Path) -> None:
    join_group(rank, W, folder)
    table = folder / f"{rank}.csv"
    table.write_text("filepath,title\n" + "a.png,x\n" * (30 + rank))
    try:
        train(options(folder / "run", data=str(table)))
    except ValueError as error:
        (folder / f"{rank}.txt").write_text(str(error))
    dist.destroy_process_group()


@pytest.mark.fault("Processes see different data", "All of them raise an error that states what each one sees")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks are forked")
def test_ranks_that_see_different_data_are_told(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_sees, args=(rank, tmp_path)) for rank in range(W)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    told = [(tmp_path / f"{rank}.txt").read_text() for rank in range(W)]
    seen = r"different data: rank 0 has 30 samples, of which the first is a.png \(digest \w+\), rank 1 has 31 "
    assert all(re.search(seen, line) for line in told)
