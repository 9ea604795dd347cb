"""The operations of a step against closed forms, and the model FLOP utilisation that follows from them."""

from __future__ import annotations

import json
import logging
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from support import needs
from support.processes import join_group

needs("train")

import fastclip.training.planning.operations as counting
import fastclip.training.run.utilisation as utilisation
from fastclip.data.batch import Batch
from fastclip.models import DualEncoder, create_model
from fastclip.models.config import load_config
from fastclip.training import TrainOptions, plan, train
from fastclip.training.planning.operations import Operations, matrix_rate, operations_of
from fastclip.training.ranks import World, wrap
from fastclip.training.run.metrics import Meter
from fastclip.training.run.utilisation import Utilisation
from fastclip.training.step.losses import named_loss
from fastclip.training.step.optim import build_optimizer
from fastclip.training.step.update import Stepper
from support.digits_run import digits_run

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU, None)
END = 49407


def of(name: str) -> Operations:
    return operations_of(create_model(name, device="meta"))


def blocks(tokens: int, width: int, layers: int) -> int:
    """Return the operations of Transformer blocks: 12 width^2 weights for each token, and two products of attention."""
    return layers * (2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width)


def tower(tokens: int, width: int, layers: int) -> int:
    """Return the operations of CLIP's blocks, the last of which has queries, keys and values of all tokens, but
    attends and goes on with a single one.
    """
    last = 2 * (3 * tokens + 9) * width**2 + 2 * 2 * tokens * width
    return blocks(tokens, width, layers - 1) + last


@pytest.mark.parametrize("tokens", [1, 20, 38, 77])
def test_operations_are_those_of_the_closed_forms(tokens: int) -> None:
    """ViT-B-32: 49 patches of 32 x 32 pixels and a class token; the projections to 512 act on one token."""
    found = of("ViT-B-32")
    assert found.image == 2 * 49 * 3 * 32 * 32 * 768 + tower(50, 768, 12) + 2 * 768 * 512
    assert found.image == 8_289_871_872 and found.dim == 512
    assert found.text(tokens) == pytest.approx(tower(tokens, 512, 12) + 2 * 512 * 512, rel=1e-9)


@pytest.mark.parametrize("tokens", [5, 64])
def test_operations_of_bert_are_those_of_the_closed_form(tokens: int) -> None:
    config = load_config("align-tiny")
    text = config.text_cfg
    expected = blocks(tokens, text.width, text.layers) + 2 * text.width * config.embed_dim
    assert of("align-tiny").text(tokens) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["RN-tiny", "florence-tiny", "ViT-tiny"])
def test_every_kind_of_tower_is_counted(name: str) -> None:
    found = of(name)
    assert found.image > 1e6 and found.text(10) < found.text(40)


def test_counting_leaves_random_numbers_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    state, settings = torch.get_rng_state(), torch.backends.cuda.flash_sdp_enabled()
    counting._forward.cache_clear()
    counting._matrix_rate.cache_clear()
    monkeypatch.setitem(counting._SECONDS, "cpu", 1e-3)
    assert matrix_rate(CPU, torch.float32) > 1e8 and of("ViT-tiny").image
    assert torch.equal(torch.get_rng_state(), state) and torch.backends.cuda.flash_sdp_enabled() == settings
    counting._matrix_rate.cache_clear()  # a longer measurement is more exact


@pytest.mark.parametrize("speed", [1e9, 3e10, 1e12, 1e15])
@pytest.mark.parametrize("kind, promised", [("cpu", 0.1), ("cuda", 0.3)])
def test_rate_is_measured_in_time_on_every_device(
    monkeypatch: pytest.MonkeyPatch, kind: str, promised: float, speed: float
) -> None:
    """The clock counts products of a device with this speed; every wait for it takes 10 microseconds. A random number
    takes 20 nanoseconds, and a copied number 1 on a CPU.
    """
    clock, sizes = [0.0], []

    def multiply(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        clock[0] += 2 * len(a) ** 3 / speed
        sizes.append(len(a))
        return out

    def draw(rows: int, columns: int, **_: Any) -> torch.Tensor:
        clock[0] += 2e-8 * rows * columns
        return torch.empty(1).expand(rows, columns)

    def repeat(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        rows, columns = rows * len(x), columns * x.shape[1]
        clock[0] += (1e-9 if kind == "cpu" else 1e-12) * rows * columns
        return x[:1, :1].expand(rows, columns)

    def now() -> float:
        clock[0] += 5e-6
        return clock[0]

    for table in (counting._SECONDS, counting._SIZES, counting._AT_A_TIME):
        monkeypatch.setitem(table, "cpu", table[kind])
    counting._matrix_rate.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "mm", multiply)
        patch.setattr(torch, "rand", draw)
        patch.setattr(torch.Tensor, "repeat", repeat)
        patch.setattr(torch, "empty_like", lambda x: x)
        patch.setattr("time.perf_counter", now)
        rate = matrix_rate(CPU, torch.float32)
    counting._matrix_rate.cache_clear()
    assert clock[0] < promised and 0.95 * speed < rate <= speed * (1 + 1e-9)
    if speed == 1e15:
        assert sizes.count(counting._SIZES[kind][1]) > 10  # a fast device is measured more than once


def test_useful_operations_of_a_step() -> None:
    """A backward pass has twice the operations of a forward pass."""
    found, pairs = Operations(100, ((1, 11), (2, 24), (4, 56)), 8, True, True), 10
    loss = 2 * pairs * pairs * 8
    assert [found.text(tokens) for tokens in (3, 10)] == [39, 200]  # tokens^2 + 10 tokens
    assert found.useful(pairs, 3) == 3 * pairs * (100 + 39) + 3 * loss


def test_locked_towers_have_no_backward_pass() -> None:
    model = create_model("ViT-tiny", device="meta")
    whole, pairs = operations_of(model), 4
    model.lock_image_tower()
    locked = operations_of(model)
    assert (locked.trains_image, locked.trains_text) == (False, True)
    saved = 2 * pairs * whole.image + 2 * pairs * pairs * 64  # of the tower, and the gradient of its features
    assert locked.useful(pairs, 20) == whole.useful(pairs, 20) - saved


def test_loss_of_prefixes_is_counted_once_for_each() -> None:
    model, pairs = create_model("ViT-tiny", device="meta"), 16
    whole, parts = operations_of(model), operations_of(model, (16, 64))
    assert parts.useful(pairs, 20) - whole.useful(pairs, 20) == 3 * 2 * pairs * pairs * 16
    assert parts.executed(pairs, 20) - whole.executed(pairs, 20) == 4 * 2 * pairs * pairs * 16
    assert plan(model, batch_size=pairs, prefixes=(16, 64)).count_operations() == parts


def test_executed_operations_have_what_saves_memory() -> None:
    model, pairs = create_model("ViT-tiny", device="meta"), 16
    plain = operations_of(model)
    loss = 2 * pairs * pairs * 64
    forward = pairs * plain.forward(20)
    assert plain.executed(pairs, 20) == pytest.approx(3 * forward + 4 * loss)  # the logits are computed twice
    assert plain.executed(pairs, 20, again=0.25) == pytest.approx(3.25 * forward + 4 * loss)
    for name in ("ViT-tiny", "align-tiny", "RN-tiny", "florence-tiny"):
        model = create_model(name, device="meta")
        assert not operations_of(model).checkpointing
        model.set_grad_checkpointing()
        assert operations_of(model).checkpointing, name
    saving = operations_of(model)
    assert saving.executed(1, 9) - saving.useful(1, 9) == pytest.approx(saving.forward(9) + 2 * saving.dim)


def batches(lengths: list[int], context_length: int) -> list[Batch]:
    """Return one micro-batch of CLIP's texts of these lengths."""
    ids = torch.zeros(len(lengths), context_length, dtype=torch.int64)
    for row, n in zip(ids, lengths):
        row[:n] = torch.arange(1, n + 1)
        row[n - 1] = END
    count = len(lengths)
    return [Batch(torch.randn(count, 3, 32, 32), ids, torch.arange(count), tuple(map(str, range(count))))]


def stepper(model: DualEncoder, world: World) -> Stepper:
    optimizer = build_optimizer("adamw", model, lr=1e-3, weight_decay=0.1)
    wrapped = wrap(model, world, "ddp")
    return Stepper(model, wrapped, named_loss("clip", group=world.group), optimizer, world)


@pytest.mark.parametrize("context_length", [16, 40])
def test_padding_does_not_count(context_length: int) -> None:
    model = create_model("ViT-tiny", context_length=context_length)
    report = stepper(model, ALONE).step(batches([2, 16, 9], context_length), step=0)
    assert report.tokens == 2 + 16 + 9


def _count(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    group = join_group(rank, 2, folder)
    world = World(rank, 2, CPU, torch.distributed.group.WORLD if group is None else group)
    torch.manual_seed(0)
    model = create_model("ViT-tiny", context_length=16)
    report = stepper(model, world).step(batches([[2, 16], [9, 4]][rank], 16), step=0)
    utilisation.matrix_rate = lambda *_: [3e9, 1e9][rank]
    share = Utilisation(model, world, batch_size=4, autocast=None)(1, report.tokens, 0.5)
    (folder / f"{rank}.json").write_text(json.dumps([report.tokens, share]))
    torch.distributed.destroy_process_group()


def test_ranks_share_one_utilisation(tmp_path: Path) -> None:
    """The utilisation is the operations of all ranks over the sum of their rates."""
    context = multiprocessing.get_context("spawn")  # autograd may have threads, which do not survive a fork
    processes = [context.Process(target=_count, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    tokens = 2 + 16 + 9 + 4
    assert one == other and one[0] == tokens
    model = create_model("ViT-tiny", context_length=16, device="meta")
    assert one[1] == pytest.approx(operations_of(model).useful(4, tokens / 4) / (0.5 * 4e9))


def test_meter_gives_what_was_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first steps are slower and have no utilisation. What it takes to measure it does not count as training."""
    clock, asked = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def share(steps: int, tokens: int, seconds: float) -> float:
        asked.append((steps, tokens, seconds))
        clock[0] += 100
        return 0.25

    meter = Meter(8, share)
    for step in range(12):
        clock[0] += 2
        meter.stepped(tokens=50)
        if step in (9, 10):
            assert ("mfu" in meter.read()) == (step == 10)
    assert asked == [(1, 50, 2.0)]
    assert meter.read() == {"samples_per_second": 4.0, "data_wait": 0.0, "mfu": 0.25}


def test_utilisation_leaves_out_the_first_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first reading covers steps of the warm-up too: its throughput has them, and its utilisation does not."""
    clock, asked = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    meter = Meter(8, lambda *of: asked.append(of))
    for step in range(100):
        clock[0] += 10 if step < 10 else 2
        meter.stepped(tokens=100 if step < 10 else 50)
        with meter.paused():
            clock[0] += 7
        if step in (49, 99):
            assert meter.read()["samples_per_second"] == pytest.approx(50 * 8 / (180 if step == 49 else 100))
    assert asked == [(40, 40 * 50, 80.0), (50, 50 * 50, 100.0)]


def options(folder: Path) -> TrainOptions:
    return digits_run(folder, loss="clip", batch_size=8, max_steps=12, log_every=5)


def test_run_says_its_utilisation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(utilisation, "matrix_rate", lambda *_: 5e13)
    with caplog.at_level(logging.INFO):
        run = train(options(tmp_path))
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert ["mfu" in line for line in lines] == [False, False, True]
    (line,) = lines[2:]
    model = create_model("ViT-tiny", context_length=16, device="meta")
    low, high = (operations_of(model).useful(8, n) * line["samples_per_second"] / 8 / 5e13 for n in (2, 16))
    assert low < line["mfu"] < high
    assert caplog.text.count("matrix products: 50 TFLOP/s in fp32") == 1


def test_run_goes_on_without_utilisation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise AssertionError("no such operation")

    monkeypatch.setattr(counting, "_forward", fails)
    run = train(options(tmp_path))
    assert run.steps == 12 and "mfu" not in (run.folder / "metrics.jsonl").read_text()
    told = "no model FLOP utilisation (mfu): the operations of the model cannot be counted: no such operation"
    assert caplog.text.count(told) == 1


def test_model_without_configuration_cannot_be_counted() -> None:
    model = create_model("ViT-tiny", device="meta")
    with pytest.raises(ValueError, match="the model has no configuration"):
        operations_of(DualEncoder(model.visual, model.text))
