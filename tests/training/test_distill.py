"""Runs with --distill: frozen teachers, whose loss is added to that of the batch."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import math
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from support import needs
from support.processes import join_group

needs("train")

from fastclip.cli import main
from fastclip.data.batch import Batch
from fastclip.models import DualEncoder, create_model
from fastclip.models.transforms import PixelNormalization
from fastclip.parity.promised import LOSS
from fastclip.system.reading import read_tensors
from fastclip.training import Run, TrainOptions, train, trainer
from fastclip.training.options import parse_options, read_options
from fastclip.training.planning import choose
from fastclip.training.planning.memory import plan
from fastclip.training.planning.operations import operations_of
from fastclip.training.planning.speed import speed
from fastclip.training.planning.teachers import NO_TEACHERS, plan_teachers
from fastclip.training.step.distillation import Teacher
from fastclip.training.step.update import Stepper, StepReport
from support.digits_run import digits_run

W, B = 2, 12
LIKE, OTHER = "like", "other"  # a teacher with the student's inputs, and one whose images are larger


def write_teachers(folder: Path) -> None:
    for seed, (name, model, sizes) in enumerate(((LIKE, "ViT-tiny", {}), (OTHER, "ViT-tiny", {"image_size": 48})), 7):
        torch.manual_seed(seed)
        teacher = create_model(model, context_length=16 + seed, **sizes)
        with torch.no_grad():
            teacher.logit_scale.fill_(math.log(30.0))
            for p in teacher.visual.parameters():  # features of new weights are much alike
                p.mul_(2.0)
        if name == OTHER:
            assert teacher.config is not None
            cfg = teacher.config
            teacher.config = dataclasses.replace(
                cfg, preprocess_cfg=dataclasses.replace(cfg.preprocess_cfg, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
            )
        teacher.save_pretrained(folder / name)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("teachers")
    write_teachers(folder)
    return str(folder / LIKE), str(folder / OTHER)


def options(folder: Path, teachers: Sequence[str], **changed: Any) -> TrainOptions:
    return digits_run(
        folder, **{"distill": tuple(teachers), "loss": "clip", "batch_size": B, "max_steps": 4, "lr": 1e-3, **changed}
    )


def lines(run: Run) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").open()]


def logits(model: DualEncoder, batch: Batch, scale: Tensor) -> Tensor:
    """Return the logits (N, N) of a model in float64, with the pixels resized as its configuration asks."""
    assert model.config is not None
    pixels, side = batch.images, model.config.vision_cfg.image_size
    if pixels.shape[-1] != side:
        wide = F.interpolate(pixels.float(), size=(side, side), mode="bicubic", antialias=True)
        pixels = wide.round().clamp(0, 255).to(torch.uint8)
    images = PixelNormalization.of(model.config)(pixels)
    image, text = model.double().encode_image(images.double(), True), model.encode_text(batch.ids, True)
    return scale.double() * image @ text.T


def dense(student: DualEncoder, paths: Sequence[str], batch: Batch) -> tuple[float, float]:
    """Return both parts of the loss by their formulas in float64."""
    own, contrastive, distillation = torch.arange(len(batch.keys)), 0.0, 0.0
    with torch.no_grad():
        z = logits(student, batch, student.logit_scale.exp())
        taught = [create_model(pretrained=path).eval() for path in paths]
        t = torch.stack([logits(teacher, batch, teacher.logit_scale.exp()) for teacher in taught])
        for mine, theirs in ((z, t), (z.T, t.transpose(1, 2))):
            contrastive += float(F.cross_entropy(mine, own)) / 2
            p = theirs.softmax(2).mean(0)
            distillation += float(-(p * mine.log_softmax(1)).sum(1).mean()) / 2
    return contrastive, distillation


def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Stepper, DualEncoder, Batch]]:
    """Record each step's model before the update and its batch."""
    record: list[tuple[Stepper, DualEncoder, Batch]] = []
    real = Stepper.step

    def step(self: Stepper, batches: Sequence[Batch], **given: Any) -> StepReport:
        whole = Batch(
            *(torch.cat([getattr(b, name) for b in batches]) for name in ("images", "ids", "labels")),
            tuple(key for b in batches for key in b.keys),
        )
        record.append((self, copy.deepcopy(self.model), whole))
        return real(self, batches, **given)

    monkeypatch.setattr(Stepper, "step", step)
    return record


@pytest.mark.parametrize(
    ("loss", "weight", "factor"), [("clip", 1.0, 1.0), ("clip", 0.3, 1.0), ("align", 2.0, 2.0), ("unicl", 1.0, None)]
)
def test_loss_is_the_sum_of_both_formulas(
    tmp_path: Path,
    teachers: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    loss: str,
    weight: float,
    factor: float | None,
) -> None:
    """Teachers may have other images and a longer context."""
    record = seen(monkeypatch)
    changed: dict[str, Any] = {"loss": loss, "distill_weight": weight, "max_steps": 2}
    run = train(options(tmp_path, teachers, label_smoothing=0.0, **changed))
    for line, (_, model, batch) in zip(lines(run), record, strict=True):
        contrastive, distillation = dense(model, teachers, batch)
        if factor is not None:
            assert line["loss_contrastive"] == pytest.approx(factor * contrastive, rel=LOSS)
        assert line["loss_distillation"] == pytest.approx(distillation, rel=LOSS)
        assert line["loss"] == pytest.approx(line["loss_contrastive"] + weight * distillation, rel=LOSS)
        assert abs(distillation - contrastive) > 1e-3  # the teachers do not just know the pairs


def test_teachers_are_frozen_and_students_learn_from_them(
    tmp_path: Path, teachers: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = seen(monkeypatch)
    run = train(options(tmp_path / "a", teachers))
    distillation = record[-1][0].distillation
    assert distillation is not None and len(distillation.teachers) == 2
    for teacher, path in zip(distillation.teachers, teachers):
        before = create_model(pretrained=path).state_dict()
        assert all(torch.equal(x, before[name]) for name, x in teacher.model.state_dict().items())
        assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())
        assert not any(module.training for module in teacher.model.modules())
    without = train(options(tmp_path / "b", teachers, distill=None))
    weightless = train(options(tmp_path / "c", teachers, distill_weight=0.0))
    assert run.losses[1:] != without.losses[1:]
    assert weightless.losses == pytest.approx(without.losses, rel=LOSS)
    names = read_tensors(tmp_path / "a" / "checkpoints" / "step-00000004" / "model.safetensors").keys()
    assert names == create_model("ViT-tiny").state_dict().keys()  # without the teachers
    assert not any(module.training for module in Teacher("new", create_model("ViT-tiny").train()).model.modules())


@pytest.mark.parametrize(
    "how", [{}, {"keep_graphs": 2}, {"features_on": "cpu"}, {"loss": "convirt"}, {"precision": "bf16"}]
)
def test_micro_batches_equal_the_whole_batch(tmp_path: Path, teachers: tuple[str, str], how: dict[str, Any]) -> None:
    whole = train(options(tmp_path / "a", teachers, **{k: x for k, x in how.items() if k in ("loss", "precision")}))
    parts = train(options(tmp_path / "b", teachers, micro_batch=5, **how))
    tolerance = 2e-2 if "precision" in how else LOSS
    assert parts.losses == pytest.approx(whole.losses, rel=tolerance)
    for name in ("loss_contrastive", "loss_distillation"):
        assert [x[name] for x in lines(parts)] == pytest.approx([x[name] for x in lines(whole)], rel=tolerance)


@pytest.mark.fault(
    "A run with --distill is stopped and resumed",
    "Its losses are those of a run that never stopped, bit for bit. Another teacher is named in the log",
)
def test_resumed_run_is_the_run_that_never_stopped(
    tmp_path: Path, teachers: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    whole = train(options(tmp_path / "a", teachers[:1]))
    begun = train(options(tmp_path / "b", teachers[:1], stop_after=2))
    moved = tmp_path / "moved"
    create_model(pretrained=teachers[0]).save_pretrained(moved)
    rest = train(options(tmp_path / "b", [str(moved)], resume="auto"))
    assert begun.losses + rest.losses == whole.losses
    assert "changed since" not in caplog.text  # the same weights in another place
    state = [read_tensors(r.folder / "checkpoints" / "step-00000004" / "model.safetensors") for r in (whole, rest)]
    assert all(torch.equal(x, state[1][name]) for name, x in state[0].items())
    train(options(tmp_path / "c", teachers[1:], resume=str(tmp_path / "b"), max_steps=5))
    assert f"--distill was ['{moved}'] and is now ['{teachers[1]}']" in caplog.text
    changed = create_model(pretrained=moved)
    torch.nn.init.zeros_(changed.logit_scale)
    changed.save_pretrained(moved)
    train(options(tmp_path / "d", [str(moved)], resume=str(tmp_path / "b"), max_steps=5))
    assert f"--distill {moved}: the weights of the teachers differ" in caplog.text


def test_options_and_their_files(tmp_path: Path, teachers: tuple[str, str]) -> None:
    """--distill may be repeated or take several paths, and the command line replaces the teachers of a file."""
    base = ["--data", "digits", "--model", "ViT-tiny", "--output", "x"]
    for words in ("--distill a b", "--distill a --seed 3 --distill b", "--distill=a --no-async-save --distill=b"):
        assert parse_options([*base, *words.split()]).distill == ("a", "b")
    run = train(options(tmp_path, teachers, max_steps=1))
    found = read_options(run.folder / "config.yaml")
    assert found.distill == teachers and found.distill_weight == 1.0
    again = parse_options(["--config", str(run.folder / "config.yaml"), "--distill", "c"])
    assert again.distill == ("c",)


def test_mistakes_are_named_before_training(tmp_path: Path, teachers: tuple[str, str]) -> None:
    torch.manual_seed(0)
    create_model("ViT-tiny", context_length=8).save_pretrained(tmp_path / "short")
    (tmp_path / "bare").mkdir()
    torch.save(create_model("ViT-tiny", context_length=16).state_dict(), tmp_path / "bare" / "weights.pt")
    bare = str(tmp_path / "bare" / "weights.pt")
    for changed, message in (
        ({"loss": "siglip"}, "does not go with --loss siglip: choose clip, unicl, align or convirt"),
        ({"loss": "global"}, "does not go with --loss global"),
        ({"prefixes": (16, 64)}, "--distill compares whole features: leave out --prefixes"),
        ({"comm": "ring"}, "--distill needs --comm gather"),
        ({"distill": ()}, "--distill needs the path of at least one checkpoint"),
        ({"distill": None, "distill_weight": 0.5}, "--distill-weight belongs to --distill"),
        ({"distill_weight": -1.0}, "--distill-weight must be finite and not negative"),
        ({"distill": (str(tmp_path / "short"),)}, "the teacher takes 8 tokens, but the student's texts have up to 16"),
        ({"distill": (bare,)}, "contains no configuration: name its model, as in --distill ViT-B-32="),
        ({"model": "align-tiny"}, "another tokenizer.*ClipTokenizer.*than the student align-tiny.*BertTokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            train(options(tmp_path / "a", teachers, **changed))
    with pytest.raises(FileNotFoundError, match="--distill nowhere: there is no such file or folder"):
        train(options(tmp_path / "a", ["nowhere"]))
    assert train(options(tmp_path / "a", [f"ViT-tiny={bare}"], max_steps=1)).steps == 1


def test_plan_counts_the_teachers(capsys: pytest.CaptureFixture[str], teachers: tuple[str, str]) -> None:
    """Their weights, their features and their forward pass, whose operations are not useful."""
    words = "plan --model ViT-tiny --context-length 16 --batch-size 256 --memory 8 --device cpu --tflops 1"
    figures = []
    for more in ([], ["--distill", "RN-tiny"], ["--distill", teachers[0], "--distill", f"RN-tiny={teachers[1]}"]):
        main([*words.split(), *more])
        figures.append(capsys.readouterr().out)
    assert "teachers" not in figures[0]
    assert main([*words.split(), "--context-length", "77", "--distill", teachers[0]]) == 1
    assert "the teacher takes 23 tokens, but the student's texts have up to 77" in capsys.readouterr().err
    teacher = create_model("RN-tiny", device="meta")
    size = sum(p.numel() for p in teacher.parameters())
    assert f"1 frozen, of {size / 1e6:,.1f} M, and their features of 256 pairs" in figures[1]
    assert "2 frozen, of" in figures[2] and "because teachers embed the batch" in figures[2]
    useful = [line for text in figures for line in text.splitlines() if line.startswith("useful operations")]
    assert len(set(useful)) == 1
    student = create_model("ViT-tiny", device="meta")
    assert teacher.config is not None
    taught = plan_teachers([teacher.config], context_length=77, device="cpu")
    with_teacher, alone = (plan(student, batch_size=256, device="cpu", teachers=x) for x in (taught, NO_TEACHERS))
    assert taught.held(256) == 4 * size + taught.buffers + 256 * 2 * teacher.config.embed_dim * 4
    assert with_teacher.held - alone.held == taught.held(256)
    assert with_teacher.tensors >= with_teacher.held + taught.peak(256) > 0
    operations = operations_of(teacher)
    executed = [speed(one, 1e12).executed for one in (with_teacher, alone)]
    products = 2 * 2 * 256**2 * teacher.config.embed_dim
    assert executed[0] - executed[1] == pytest.approx(256 * operations.forward(77) + products)


def test_micro_batch_auto_leaves_room_for_the_teachers(
    tmp_path: Path, teachers: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    student = create_model("ViT-tiny", device="meta", context_length=16)
    room = plan(student, batch_size=48, device="cpu").total + 2**20  # less than the weights of a teacher
    monkeypatch.setattr(choose, "usable_memory", lambda device, **known: room)
    found = []
    for distill in (None, teachers):
        run = train(options(tmp_path / str(distill is None), teachers, distill=distill, batch_size=48, max_steps=1))
        found.append(read_options(run.folder / "config.yaml").micro_batch)
    assert found[0] == 48 and isinstance(found[1], int) and found[1] < 48


def test_teacher_with_broken_features_is_named(tmp_path: Path, teachers: tuple[str, str]) -> None:
    broken = create_model(pretrained=teachers[0])
    with torch.no_grad():
        for p in broken.visual.parameters():
            p.fill_(3e38)
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(FloatingPointError, match=f"features of the teacher {tmp_path / 'broken'} of "):
        train(options(tmp_path / "a", [str(tmp_path / "broken")]))


CASES: dict[str, dict[str, Any]] = {
    "ddp": {"micro_batch": 4},
    "unequal": {"batch_size": 13, "micro_batch": 3, "loss": "align"},
    "fsdp": {"parallel": "fsdp"},
}


def work(rank: int, folder: Path, teachers: tuple[str, str]) -> None:
    torch.set_num_threads(1)
    join_group(rank, W, folder)
    for name, changed in CASES.items():
        run = train(options(folder / name, teachers, **changed))
        (folder / f"{name} {rank}.json").write_text(json.dumps(run.losses))
    dist.destroy_process_group()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks are forked")
def test_two_ranks_train_as_one(tmp_path: Path, teachers: tuple[str, str]) -> None:
    importlib.import_module("torch.distributed.fsdp")  # once, before the fork

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank, tmp_path, teachers)) for rank in range(W)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0] * W
    for name, changed in CASES.items():
        found = [json.loads((tmp_path / f"{name} {rank}.json").read_text()) for rank in range(W)]
        alone = train(options(tmp_path / f"{name} alone", teachers, **changed))
        assert found[0] == found[1] == pytest.approx(alone.losses, rel=LOSS)
        parts = [
            [x["loss_distillation"] for x in lines(run)] for run in (alone, alone._replace(folder=tmp_path / name))
        ]
        assert parts[0] == pytest.approx(parts[1], rel=LOSS)


def test_teacher_is_not_compiled(tmp_path: Path, teachers: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from fastclip.training.step import compiled

    monkeypatch.setattr(compiled, "_BACKEND", "eager")
    monkeypatch.setattr(trainer, "obstacle", lambda *_, **__: None)
    record = seen_models(monkeypatch)
    run = train(options(tmp_path, teachers, compile=True, max_steps=2))
    assert run.steps == 2 and record
    for model in record:
        assert all(module._compiled_call_impl is None for module in model.modules())


def seen_models(monkeypatch: pytest.MonkeyPatch) -> list[DualEncoder]:
    """Record the models of the teachers."""
    models: list[DualEncoder] = []
    real = trainer.build_distillation

    def built(*args: Any) -> Any:
        distillation = real(*args)
        models.extend(teacher.model for teacher in distillation.teachers)
        return distillation

    monkeypatch.setattr(trainer, "build_distillation", built)
    return models
