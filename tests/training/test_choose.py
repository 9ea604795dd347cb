"""`--micro-batch auto` and `--keep-graphs auto`: what is chosen, for which memory, and that it changes no result."""

from __future__ import annotations

import logging
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from support import needs

needs("train")

from fastclip import create_model
from fastclip.system import machine
from fastclip.system.reading import read_tensors
from fastclip.training import Plan, Run, TrainOptions, plan, train
from fastclip.training.options import read_options
from fastclip.training.planning import choose as module
from fastclip.training.planning.choose import Choice, choose, has_statistics, settle, usable_memory
from fastclip.training.planning.footprint import Footprint, Moment, footprint, rough_footprint
from fastclip.training.ranks import World
from fastclip.training.run.checkpoints import read_state
from support.digits_run import digits_run

MIB = 2**20
ALONE = World(0, 1, torch.device("cpu"), None)
FREE = Footprint((), Moment(0, 0, 0), tuple, 1, 4)
MODELS = ("ViT-tiny", "align-tiny")


def options(folder: Path, **changed: Any) -> TrainOptions:
    return digits_run(folder, **{"batch_size": 48, **changed})


def messages(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[str]:
    return [x.message for x in caplog.records if x.levelno == level and x.name.endswith("planning.choose")]


@pytest.fixture(scope="module")
def small() -> Plan:
    return plan(create_model("ViT-tiny", device="meta"), batch_size=4096, micro_batch=64, device="cpu")


def between(p: Plan, share: float) -> float:
    """Return a memory between that of a step with a micro-batch of one pair and that of a step without caching."""
    low, high = (replace(p, micro_batch=size, keep_graphs=0).total for size in (1, p.pairs))
    return low + share * (high - low)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("device", "precision"), [("cpu", "fp32"), ("cuda", "bf16")])
def test_rough_footprint_is_an_upper_bound(name: str, device: str, precision: str) -> None:
    """A step that fits by the rough footprint fits by the exact one, which is then not needed."""
    model = create_model(name, device="meta", context_length=16)
    assert model.config is not None
    sizes = {"image_size": model.config.vision_cfg.image_size, "context_length": 16}
    rough, exact = (rough_footprint(model, **sizes), footprint(model, **sizes, precision=precision, device=device))
    for pairs in (1, 16, 4096):
        assert exact.kept(pairs) <= rough.kept(pairs) <= 12 * exact.kept(pairs) + rough.kept(0)
        assert exact.embedding_peak(pairs) <= rough.embedding_peak(pairs)
        for share in (0.0, 1.0):
            assert exact.peak(pairs, share) <= rough.peak(pairs, share)


def test_whole_share_is_taken_if_it_fits(small: Plan) -> None:
    whole = replace(small, micro_batch=4096)
    chosen = choose(small, whole.total)
    assert chosen is not None and (chosen.micro_batch, chosen.cached) == (4096, False)
    chosen = choose(small, whole.total - 1)
    assert chosen is not None and chosen.cached
    chosen = choose(small, math.inf, caching=True)
    assert chosen is not None and chosen.cached and chosen.kept_graphs == chosen.micro_batches


@pytest.mark.parametrize("kind", [{}, {"world_size": 4}, {"world_size": 3, "parallel": "fsdp"}, {"device": "cuda"}])
def test_choice_never_takes_more_than_the_memory(small: Plan, kind: dict[str, Any]) -> None:
    p, drawn = replace(small, **kind), random.Random(0)
    for _ in range(8):
        memory = between(p, drawn.random())
        for given in ({}, {"keep_graphs": 0}, {"keep_graphs": 2}, {"micro_batch": 1}, {"largest": True}):
            chosen = choose(p, memory, **given)
            if chosen is None:  # two kept graphs, or the one given micro-batch, do not fit
                assert "keep_graphs" in given or "micro_batch" in given
                continue
            assert chosen.total <= memory
            assert chosen.micro_batch == given.get("micro_batch", chosen.micro_batch)
            if chosen.cached and given.get("keep_graphs") != 2:
                more = replace(chosen, keep_graphs=chosen.kept_graphs + 1)
                assert given.get("keep_graphs") == 0 or chosen.kept_graphs == chosen.most_graphs or more.total > memory
            shares = {(r + 1) * p.batch_size // p.world_size - r * p.batch_size // p.world_size for r in range(3)}
            if p.sharded and "micro_batch" not in given:
                assert len({-(-share // chosen.micro_batch) for share in shares}) == 1
    assert choose(p, between(p, -0.1)) is None


def test_choice_has_the_least_work(small: Plan) -> None:
    """Fewer pairs are embedded twice than with the largest micro-batch, and passes are not tiny."""
    for share in (0.4, 0.8):
        memory = between(small, share)
        best, largest = choose(small, memory), choose(small, memory, largest=True)
        assert best is not None and largest is not None
        divisors = (replace(small, micro_batch=2**k, keep_graphs=0) for k in range(12))
        assert largest.micro_batch == max(p.micro_batch for p in divisors if p.total <= memory)
        twice = [4096 - p.kept_graphs * p.micro_batch for p in (best, largest)]
        assert twice[0] < twice[1] and 16 <= best.micro_batch <= largest.micro_batch


def test_models_with_batch_norm_are_recognised() -> None:
    assert has_statistics(create_model("RN-tiny", device="meta"))
    assert not has_statistics(create_model("ViT-tiny", device="meta"))
    model = create_model("RN-tiny", device="meta")
    model.lock_image_tower()
    assert not has_statistics(model)  # a frozen tower uses its running statistics


def test_memory_is_a_share_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(machine, "memory_bytes", lambda: 1000.0)
    monkeypatch.setattr(machine, "container_bytes", lambda: 800.0)
    monkeypatch.setattr(machine, "available_bytes", lambda: 700.0)
    assert (usable_memory(cpu), usable_memory(cpu, processes=4)) == (400, 100)
    monkeypatch.setattr(machine, "available_bytes", lambda: 100.0)  # others use the rest
    assert usable_memory(cpu) == usable_memory(cpu, share=1.0) == 90
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 250)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert usable_memory(gpu, held=80) == 900
    assert usable_memory(gpu, held=20) == 870  # 80 bytes belong to something else


def limited(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(module, "usable_memory", lambda device, **known: size)


@pytest.fixture(scope="module")
def tight() -> dict[str, float]:
    """Memory with which the step of `options` needs gradient caching and keeps some graphs, for each model."""
    found = {}
    for name in ("ViT-tiny", "RN-tiny"):
        p = plan(create_model(name, device="meta", context_length=16), batch_size=48, device="cpu")
        found[name] = between(p, 0.6)
    return found


def test_run_says_what_was_chosen_and_records_it(
    tmp_path: Path, tight: dict[str, float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    whole = train(options(tmp_path / "whole"))
    assert messages(caplog) == []  # there is enough memory by far, so no plan is made
    assert read_options(whole.folder / "config.yaml").micro_batch == 48
    limited(monkeypatch, tight["ViT-tiny"])
    run = train(options(tmp_path / "run"))
    (told,) = messages(caplog)
    used = read_options(run.folder / "config.yaml")
    assert isinstance(used.micro_batch, int) and used.micro_batch < 48 and used.keep_graphs == "auto"
    assert told.startswith(f"--micro-batch auto --keep-graphs auto: micro-batches of {used.micro_batch} pairs, ")
    assert f"of {-(-48 // used.micro_batch)} graphs kept: a step takes 5" in told and told.endswith("MiB")
    state = read_state(run.folder / "checkpoints/step-00000003", "options")
    assert (state["options"]["micro_batch"], state["ranks"]) == (used.micro_batch, 1)
    assert run.losses == pytest.approx(whole.losses, rel=1e-5)
    again = train(replace(used, output=str(tmp_path / "again")))  # config.yaml repeats the run
    assert again.losses == run.losses


def weights(run: Run) -> dict[str, torch.Tensor]:
    return create_model(pretrained=run.folder / "model").state_dict()


@pytest.mark.parametrize("name", ["ViT-tiny", "RN-tiny"])
def test_resumed_run_has_the_same_micro_batch_and_bits(
    tmp_path: Path,
    name: str,
    tight: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A run that resumes with more memory keeps its micro-batch. Kept graphs, chosen anew, change no bit."""
    limited(monkeypatch, tight[name])
    through = train(options(tmp_path / "a", model=name, keep_graphs=0, max_steps=2))
    train(options(tmp_path / "b", model=name, keep_graphs=0, max_steps=2, stop_after=1))
    limited(monkeypatch, 1e12)
    caplog.clear()
    resumed = train(options(tmp_path / "b", model=name, resume="auto", max_steps=2))
    assert "was" not in caplog.text
    micro_batch = read_options(through.folder / "config.yaml").micro_batch
    assert read_options(resumed.folder / "config.yaml").micro_batch == micro_batch != 48
    assert resumed.losses == through.losses[1:]
    for key, x in weights(through).items():
        assert torch.equal(x, weights(resumed)[key]), key


def test_resume_with_another_batch_chooses_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 1e12)
    model = create_model("ViT-tiny", context_length=16)

    def chosen(before: dict[str, Any]) -> Choice:
        return settle(options(tmp_path), model, ALONE, before=before)

    then: dict[str, Any] = {"options": {"batch_size": 48, "micro_batch": 16}, "ranks": 1}
    assert chosen(then) == Choice(16, 3)
    assert chosen({**then, "ranks": 2}) == chosen({**then, "options": {"batch_size": 96}}) == Choice(48, 0)
    assert chosen({"options": {"batch_size": 48, "micro_batch": None}}) == Choice(48, 0)  # of an older version


def test_all_ranks_keep_as_many_graphs_as_the_one_with_the_fewest_micro_batches(tmp_path: Path) -> None:
    """Otherwise DistributedDataParallel exchanges its buckets at different times, and the ranks wait forever."""
    model, pair = create_model("ViT-tiny", context_length=16), World(0, 2, torch.device("cpu"), None)
    for batch, micro_batch, most in ((25, 12, 0), (24, 12, 0), (25, 4, 2), (32, 4, 3)):
        asked = options(tmp_path, batch_size=batch, micro_batch=micro_batch, keep_graphs=9)
        assert settle(asked, model, pair) == Choice(micro_batch, most)
        assert replace(plan_of(batch, micro_batch), keep_graphs=9).kept_graphs == most
    assert settle(options(tmp_path, micro_batch=12, keep_graphs=9), model, ALONE) == Choice(12, 4)


def plan_of(batch_size: int, micro_batch: int) -> Plan:
    model = create_model("ViT-tiny", device="meta", context_length=16)
    return plan(model, batch_size=batch_size, micro_batch=micro_batch, world_size=2, device="cpu", measured=FREE)


def test_model_that_cannot_be_planned_is_trained_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("data-dependent")

    limited(monkeypatch, 600 * MIB)
    monkeypatch.setattr(module, "_rough", fails)
    assert len(train(options(tmp_path)).losses) == 3
    (told,) = messages(caplog, logging.WARNING)
    assert "cannot be planned (data-dependent): micro-batches of 48 pairs are used, and 0 graphs are kept" in told


def test_too_little_memory_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limited(monkeypatch, MIB)
    assert settle(options(tmp_path), create_model("ViT-tiny", context_length=16), ALONE) == Choice(16, 0)
    (told,) = messages(caplog, logging.WARNING)
    assert "micro-batches of 16 pairs, 0 of 3 graphs kept: a step takes" in told and "of 1.0 MiB, by pred" in told


def test_memory_that_is_not_free_is_never_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If half of the memory is too small for a step, the other half is used as far as it is free."""
    model = create_model("ViT-tiny", context_length=16)
    needed = plan(model, batch_size=48, micro_batch=1, device="cpu").total
    monkeypatch.setattr(machine, "memory_bytes", lambda: 1.5 * needed)
    monkeypatch.setattr(machine, "container_bytes", lambda: math.inf)
    for free, choice in ((1.3 * needed, Choice(48, 0)), (0.9 * needed, Choice(16, 0))):
        monkeypatch.setattr(machine, "available_bytes", lambda free=free: free)
        assert settle(options(tmp_path), model, ALONE) == choice


def test_unknown_memory_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limited(monkeypatch, math.inf)
    assert settle(options(tmp_path), create_model("ViT-tiny", context_length=16), ALONE) == Choice(48, 0)
    assert "the size of the memory is unknown" in messages(caplog, logging.WARNING)[0]


def test_ranks_of_fsdp_have_equally_many_micro_batches_if_none_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 pairs at a time would be three micro-batches of 33 pairs, and two of 32."""
    limited(monkeypatch, MIB)
    model, pair = create_model("ViT-tiny", context_length=16), World(0, 2, torch.device("cpu"), None)
    for parallel, size in (("ddp", 16), ("fsdp", 11)):
        assert settle(options(tmp_path, batch_size=65, parallel=parallel), model, pair) == Choice(size, 0)


def test_log_has_the_choice_if_all_graphs_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limited(monkeypatch, 1e12)
    caplog.set_level(logging.INFO)
    settle(options(tmp_path, micro_batch=16), create_model("ViT-tiny", context_length=16), ALONE)
    (told,) = messages(caplog, logging.INFO)
    assert "--keep-graphs auto: micro-batches of 16 pairs, 3 of 3 graphs kept: a step takes at most" in told


@pytest.mark.parametrize("auto", ["auto", None])
def test_features_on_the_cpu_get_a_micro_batch(tmp_path: Path, auto: Any) -> None:
    run = train(options(tmp_path, features_on="cpu", max_steps=1, micro_batch=auto))
    assert read_options(run.folder / "config.yaml").micro_batch == 24
    with pytest.raises(ValueError, match="--features-on cpu requires gradient caching"):
        train(options(tmp_path / "one", features_on="cpu", batch_size=1))


def test_ranks_choose_for_the_one_with_the_least_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank plans with the smallest memory of all, and processes of one machine share its memory."""
    model, asked = create_model("ViT-tiny", context_length=16), options(tmp_path, batch_size=96)
    tight = between(plan(model, batch_size=96, world_size=2, device="cpu"), 0.6)
    shared: list[dict[str, Any]] = []

    def usable(device: torch.device, **known: Any) -> float:
        shared.append(known)
        return 1e12

    def of_both(value: Any, world: World) -> list[Any]:
        return [value, value] if isinstance(value, str) else [value, tight]

    monkeypatch.setattr(module, "usable_memory", usable)
    monkeypatch.setattr(module, "of_all_ranks", of_both)
    assert settle(asked, model, World(0, 2, torch.device("cpu"), None)).micro_batch < 48
    assert shared[0]["processes"] == 2


def test_prefixes_and_running_means_are_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run plans with its prefixes, and with the samples of the global loss."""
    planned: list[Plan] = []

    def watched(*args: Any, **known: Any) -> Plan:
        planned.append(plan(*args, **known))
        return planned[-1]

    monkeypatch.setattr(module, "plan", watched)
    known = {"micro_batch": "auto", "max_steps": 1}
    train(options(tmp_path / "a", prefixes=(16, 64), **known))
    assert {(p.prefixes, p.samples) for p in planned} == {((16, 64), 0)}
    planned.clear()
    run = train(options(tmp_path / "b", loss="global", **known))
    means = read_tensors(run.folder / "checkpoints" / "step-00000001" / "loss.safetensors")
    assert {p.means for p in planned} == {sum(x.nbytes for x in means.values())}
