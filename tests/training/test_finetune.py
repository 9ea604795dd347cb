"""Fine-tuning starts as the zero-shot classifier, resumes after a kill with the same bits, and mixes weights."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from support import needs
from support.processes import ended, forked, forks, wait_for

needs("train")
from fastclip.cli import main
from fastclip.data.loading.batches import training_batches
from fastclip.data.picture import pixels_limited
from fastclip.data.source import Record
from fastclip.data.sources.subset import Subset
from fastclip.data.spec import open_source
from fastclip.evaluation.classification import classifier_accuracies
from fastclip.evaluation.zero_shot import class_embeddings
from fastclip.models import create_model
from fastclip.models.classifier import ImageClassifier, load_classifier
from fastclip.models.embedder import Embedder, load_embedder
from fastclip.models.tokenizers.clip import ClipTokenizer
from fastclip.models.transforms import image_transform, training_side
from fastclip.training import wise_ft as ensemble
from fastclip.training.finetune import Finetuned, FinetuneOptions, finetune, zero_shot_head
from fastclip.training.options import flag
from fastclip.training.signals import Interrupted
from fastclip.training.wise_ft import ensemble_accuracies, interpolate

OPTIONS: dict[str, Any] = {"batch_size": 24, "epochs": 2, "lr": 1e-3, "workers": 0, "save_every": 1}
STEPS = 8


def embedder_of(name: str = "ViT-tiny") -> Embedder:
    """Return an embedder with the same weights at every call."""
    torch.manual_seed(0)
    model = create_model(name)
    for module in model.modules():  # statistics other than the initial ones, so that averages show
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
    return Embedder(model, ClipTokenizer(context_length=16) if name in ("ViT-tiny", "RN-tiny") else ids, name=name)


def ids(texts: list[str]) -> torch.Tensor:
    """Tokenize texts in place of a tokenizer whose vocabulary is not available."""
    return torch.tensor([[2 + ord(letter) for letter in text.ljust(12)[-12:]] for text in texts])


@pytest.fixture(scope="module")
def digits() -> Subset:
    return Subset(open_source("digits"), range(96))


@pytest.fixture(scope="module")
def held_out() -> Subset:
    return Subset(open_source("digits", held_out=True), range(100))


def run(folder: Path, digits: Subset, name: str = "ViT-tiny", **changed: Any) -> Finetuned:
    return finetune(embedder_of(name), digits, FinetuneOptions(**{**OPTIONS, **changed}), output=folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, digits: Subset) -> Finetuned:
    return run(tmp_path_factory.mktemp("whole") / "run", digits)


def lines(folder: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("samples_per_second", "data_wait", "mfu")} for line in found]


def assert_same(found: Finetuned, whole: Finetuned) -> None:
    assert lines(found.folder) == lines(whole.folder)
    assert all(torch.equal(x, whole.tuned[name]) for name, x in found.tuned.items())


def pictures(embedder: Embedder, source: Subset) -> tuple[torch.Tensor, torch.Tensor]:
    records = [source[i] for i in range(len(source))]
    return torch.stack([embedder.transform(r.image) for r in records]), torch.tensor([r.label for r in records])


@pytest.mark.parametrize("name", ["ViT-tiny", "RN-tiny", "align-tiny", "florence-tiny"])
def test_it_begins_as_the_zero_shot_classifier(name: str, held_out: Subset) -> None:
    embedder = embedder_of(name)
    model, names, templates = embedder.model, held_out.class_names, held_out.templates
    head = zero_shot_head(embedder, names, templates)
    classifier = ImageClassifier(model.visual, head, names)
    images, labels = pictures(embedder, held_out)
    cosines = embedder.embed_images(images) @ class_embeddings(embedder, names, templates).T
    with torch.no_grad():
        logits = classifier.eval()(images)
    torch.testing.assert_close(logits, cosines * model.logit_scale.exp(), rtol=1e-4, atol=1e-4)
    found = classifier_accuracies(classifier, embedder, held_out, batch_size=32)
    near = (cosines.topk(2, dim=1).values.diff(dim=1).abs() < 1e-5).float().mean().item()
    acc1 = (cosines.argmax(dim=1) == labels).double().mean().item()
    assert abs(found["acc1"] - acc1) <= near + 1e-6  # type: ignore[operator]


def test_steps_are_those_of_a_plain_loop(whole: Finetuned, digits: Subset) -> None:
    """The steps are those of a plain loop with torch's AdamW, cross entropy and a written-out schedule."""
    embedder = embedder_of()
    visual, config = embedder.model.visual, embedder.model.config
    assert config is not None
    head = torch.nn.Linear(config.embed_dim, 10)
    classes = class_embeddings(embedder, digits.class_names, digits.templates)
    head.weight.data = classes * embedder.model.logit_scale.detach().exp()
    head.bias.data.zero_()
    parameters = [*visual.parameters(), *head.parameters()]
    matrices = [p for p in parameters if sum(size > 1 for size in p.shape) >= 2]
    others = [p for p in parameters if sum(size > 1 for size in p.shape) < 2]
    groups: Any = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    batches = training_batches(
        digits,
        image_transform(config, train=True),
        lambda texts: torch.zeros(len(texts), 1),
        batch_size=24,
        last_step=STEPS,
        min_side=training_side(config),
    )
    visual.train()
    losses = []
    for step, (batch,) in enumerate(batches):
        for group in optimizer.param_groups:  # the warm-up, a tenth of 8 steps, has no step
            group["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        loss = F.cross_entropy(head(F.normalize(visual(batch.images), dim=1)), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert whole.losses == pytest.approx(losses, rel=1e-4) and whole.steps == STEPS and whole.complete
    torch.testing.assert_close(whole.tuned["head.weight"], head.weight.detach(), rtol=1e-3, atol=1e-4)


def test_micro_batches_give_the_same_steps(whole: Finetuned, digits: Subset, tmp_path: Path) -> None:
    assert run(tmp_path / "run", digits, micro_batch=10).losses == pytest.approx(whole.losses, rel=1e-4)


@forks
def test_killed_run_goes_on_to_the_same_bits(whole: Finetuned, digits: Subset, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    pid = forked(lambda: run(folder, digits))
    wait_for(lambda: len(list((folder / "checkpoints").glob("step-*"))) >= 2)
    os.kill(pid, signal.SIGKILL)
    assert ended(pid) == -signal.SIGKILL
    found = run(folder, digits)
    assert 0 < len(found.losses) < STEPS
    assert_same(found, whole)
    assert not run(folder, digits).losses  # all steps are done
    assert_same(run(folder, digits), whole)


def test_signal_ends_it_with_a_checkpoint(
    whole: Finetuned, digits: Subset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    real, seen = ImageClassifier.forward, []

    def forward(self: ImageClassifier, images: torch.Tensor) -> torch.Tensor:
        seen.append(0)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, images)

    monkeypatch.setattr(ImageClassifier, "forward", forward)
    with pytest.raises(Interrupted) as ended:
        run(tmp_path / "run", digits, save_every=100)
    assert (ended.value.code, ended.value.steps) == (143, 3)
    assert signal.getsignal(signal.SIGTERM) is before
    found = run(tmp_path / "run", digits, save_every=100)
    assert len(found.losses) == STEPS - 3
    assert_same(found, whole)


def test_loss_that_is_not_finite_stops_before_the_update(digits: Subset, tmp_path: Path) -> None:
    embedder = embedder_of()
    embedder.model.logit_scale.data.fill_(math.inf)
    before = {name: x.clone() for name, x in embedder.model.visual.state_dict().items()}
    with pytest.raises(FloatingPointError, match=r"the loss of step 0 is nan; .* digits/\d{4}"):
        finetune(embedder, digits, FinetuneOptions(**OPTIONS), output=tmp_path / "run")
    assert all(torch.equal(x, before[name]) for name, x in embedder.model.visual.state_dict().items())
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_folder_of_something_else_is_refused(whole: Finetuned, digits: Subset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"belongs to another call: lr was 0.001, is now 0.1; choose another folder"):
        run(whole.folder, digits, lr=0.1)
    with pytest.raises(ValueError, match="checkpoint was "):
        run(whole.folder, digits, "RN-tiny")
    with pytest.raises(ValueError, match="samples was 96, is now 50"):
        run(whole.folder, Subset(digits, range(50)))
    with pytest.raises(ValueError, match=r"another call: order and captions was \w+, is now \w+; choose"):
        run(whole.folder, Subset(digits, [*range(1, 96), 0]))
    with pixels_limited(10**8), pytest.raises(ValueError, match="max_pixels was 89478485, is now 100000000"):
        run(whole.folder, digits)
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ValueError, match="mine was not written by this command: choose another folder"):
        run(tmp_path, digits)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    for wrong in (
        *({"batch_size": 0}, {"lr": 0.0}, {"epochs": math.nan}, {"warmup": -1}, {"max_bad": 7.0}),
        *({"lr": math.inf}, {"weight_decay": math.nan}, {"weight_decay": math.inf}, {"max_grad_norm": math.nan}),
    ):
        with pytest.raises(ValueError, match=f"{flag(next(iter(wrong)))} must "):
            FinetuneOptions(**wrong)  # type: ignore[arg-type]


def test_spelling_of_the_data_is_no_other_fine_tuning(whole: Finetuned, digits: Subset, tmp_path: Path) -> None:
    folder = shutil.copytree(whole.folder, tmp_path / "run")
    before = (folder / "finetune.json").read_text()
    assert '"data": "digits"' in before
    (folder / "finetune.json").write_text(before.replace('"data": "digits"', '"data": "./d/"'))
    same = Subset(digits, range(96))
    same.spec = os.path.abspath("d")
    assert_same(run(folder, same), whole)
    same.spec = "e"
    with pytest.raises(ValueError, match=r"another call: data was \S+/d, is now \S+/e; choose"):
        run(folder, same)


def test_several_processes_are_refused(digits: Subset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="in a single process, but torchrun has started 2"):
        run(tmp_path / "run", digits)
    assert not (tmp_path / "run").exists()


class Unlabelled(Subset):
    def read(self, index: int, *, min_side: int | None = None) -> Record:
        return super().read(index, min_side=min_side)._replace(label=None if index == 7 else 1)


def test_pictures_without_a_class_are_named(digits: Subset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"images without a class: {digits.key(7)}"):
        run(tmp_path / "run", Unlabelled(digits, range(24)))
    plain = Subset(digits, range(24))
    plain.class_names = ()
    with pytest.raises(ValueError, match="has no classes"):
        run(tmp_path / "other", plain)


def test_frozen_tower_stays_as_it_is(digits: Subset, tmp_path: Path) -> None:
    found = run(tmp_path / "run", digits, "RN-tiny", freeze_image=True, epochs=1)
    moved = [name for name, x in found.tuned.items() if not torch.equal(x, found.zero_shot[name])]
    assert moved == ["head.weight", "head.bias"]


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory, digits: Subset) -> Finetuned:
    return run(tmp_path_factory.mktemp("resnet") / "run", digits, "RN-tiny", epochs=1)


def test_ensemble_is_between_the_models_and_either_at_its_ends(resnet: Finetuned, held_out: Subset) -> None:
    fresh = embedder_of("RN-tiny")
    identity = fresh.identity
    head = zero_shot_head(fresh, held_out.class_names, held_out.templates)
    zero_shot = ImageClassifier(fresh.model.visual, head, held_out.class_names).eval()
    images, _ = pictures(fresh, held_out)
    resnet.mix(0.0)
    with torch.no_grad():
        assert torch.equal(resnet.classifier.eval()(images), zero_shot(images))
    assert resnet.embedder.identity == identity
    resnet.mix(1.0)
    assert all(torch.equal(x, resnet.tuned[name]) for name, x in resnet.classifier.state_dict().items())
    assert resnet.embedder.identity != identity  # cached features of one model must not be used for the other
    resnet.mix(0.25)
    statistics = 0
    for name, x in resnet.classifier.state_dict().items():
        a, b = resnet.zero_shot[name], resnet.tuned[name]
        if x.is_floating_point():
            torch.testing.assert_close(x, (0.75 * a.double() + 0.25 * b.double()).float(), rtol=1e-5, atol=1e-7)
            statistics += "running_mean" in name and not torch.equal(a, b)
        else:
            assert torch.equal(x, b)
    assert statistics  # BatchNorm's statistics are averaged as well
    with pytest.raises(ValueError, match="alpha must be between 0 and 1"):
        interpolate(resnet.zero_shot, resnet.tuned, 1.5)


def test_saved_model_and_classifier_are_read_again(whole: Finetuned, held_out: Subset) -> None:
    whole.mix(0.5)
    folder = whole.save()
    read, images = load_classifier(folder), pictures(whole.embedder, held_out)[0]
    assert read.class_names == held_out.class_names and not read.training
    with torch.no_grad():
        assert torch.equal(read(images), whole.classifier.eval()(images))
    model, before = load_embedder(whole.folder, device="cpu").model, embedder_of().model
    assert all(torch.equal(x, before.text.state_dict()[name]) for name, x in model.text.state_dict().items())
    assert all(
        torch.equal(x, whole.classifier.visual.state_dict()[name]) for name, x in model.visual.state_dict().items()
    )
    with pytest.raises(FileNotFoundError, match="contains no classifier"):
        load_classifier(whole.folder)


def test_interrupted_evaluations_go_on(whole: Finetuned, held_out: Subset, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ensemble_accuracies(whole, held_out, [0.0, 0.5])
    whole.mix(0.5)
    assert found[0.5] == classifier_accuracies(whole.classifier, whole.embedder, held_out)
    real, calls = classifier_accuracies, []
    monkeypatch.setattr(ensemble, "classifier_accuracies", lambda *a, **o: calls.append(0) or real(*a, **o))
    again = ensemble_accuracies(whole, held_out, [0.0, 0.5, 1.0])
    assert len(calls) == 1 and {alpha: again[alpha] for alpha in found} == found
    ensemble_accuracies(whole, Subset(held_out, range(50)), [0.0])  # results for other images are not reused
    assert len(calls) == 2


def test_head_computes_in_float32_under_autocast() -> None:
    embedder = embedder_of()
    head = 100 * F.normalize(torch.randn(10, embedder.dim), dim=1)
    classifier, images = ImageClassifier(embedder.model.visual, head, "0123456789").eval(), torch.randn(4, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits, features = classifier(images), embedder.model.visual(images)
    assert features.dtype == torch.bfloat16 and logits.dtype == torch.float32
    torch.testing.assert_close(logits, F.normalize(features.float(), dim=1) @ head.T)


def test_command_saves_the_average_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    embedder_of().model.save_pretrained(tmp_path / "model")
    (tmp_path / "templates").write_text("a {}\n\nthe {} digit\n")
    line = ["finetune", "--checkpoint", str(tmp_path / "model"), "--data", "digits", "--val-data", "digits"]
    line += ["--output", str(tmp_path / "run"), "--batch-size", "256", "--epochs", "1", "--workers", "0"]
    line += ["--device", "cpu", "--templates", str(tmp_path / "templates")]
    assert main([*line, "--stop-after", "2"]) == 0
    assert "2 steps so far; re-run the same command to resume" in capsys.readouterr().out
    assert not (tmp_path / "run" / "model").exists()
    with caplog.at_level(logging.INFO):
        assert main([*line, "--wise-ft", "0.5", "--reference", "cifar10"]) == 0
    assert "after 2 of 5 steps" in caplog.text
    told = capsys.readouterr().out
    assert "alpha 0.5" in told and "0 (zero-shot)" in told and "Florence fine-tuned" in told
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert not (tmp_path / "run" / "evaluations.json").exists()  # the user may correct the data before the next call
    assert [one["alpha"] for one in found] == [0.0, 0.5, 1.0]
    assert set(found[1]["metrics"]) == {"acc1", "acc5", "mean_per_class_recall"}
    read, embedder = load_classifier(tmp_path / "run" / "model"), load_embedder(tmp_path / "run", device="cpu")
    held_out = open_source("digits", held_out=True)
    assert classifier_accuracies(read, embedder, held_out) == found[1]["metrics"]
    assert main([*line, "--wise-ft", "sweep"]) == 0
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())) == 11
    unseen = [*line[:5], *line[7:], "--output", str(tmp_path / "other")]
    for more, told in ((["--wise-ft", "sweep"], "--wise-ft sweep"), (["--reference", "cifar10"], "--reference")):
        assert main([*unseen, *more]) == 1 and f"{told} needs --val-data" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    (tmp_path / "templates").write_text("a digit\n")
    assert main(line) == 1
    assert "line 1: 'a digit' must contain {} once" in capsys.readouterr().err
