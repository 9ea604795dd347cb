"""Zero-shot classification compared with CLIP_benchmark, scikit-learn and plain loops, and as a command."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from support import needs

needs("train")
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import balanced_accuracy_score, confusion_matrix
from torch import Tensor

from fastclip.cli import main
from fastclip.data.classes.prompts import read_templates
from fastclip.data.source import Source
from fastclip.data.sources.subset import Subset
from fastclip.data.spec import open_labelled, open_source
from fastclip.embedding import features
from fastclip.evaluation import classification
from fastclip.evaluation.classification import class_ranks, classification_metrics, confusion, predicted_classes
from fastclip.evaluation.zero_shot import ZeroShot, class_accuracies, class_embeddings, templates_for, zero_shot
from fastclip.models.embedder import Embedder
from support.rounding import RoundsByPlace


def digits(count: int = 150) -> Source:
    """Return held-out digits, some more frequent than others."""
    source = open_source("digits", held_out=True)
    return Subset(source, [i for i in range(len(source)) if source[i].label not in (3, 7) or i % 3 == 0][:count])


def test_metrics_are_clip_benchmarks(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("clip-benchmark")
    import clip_benchmark.metrics.zeroshot_classification as theirs

    # numpy 2.5 no longer converts an array of one element to a float
    monkeypatch.setattr(theirs, "float", lambda x: float(np.asarray(x).squeeze()), raising=False)
    source = digits()
    records = [source[i] for i in range(len(source))]

    class Pictures(torch.utils.data.Dataset[tuple[Tensor, int]]):
        classes = source.class_names

        def __len__(self) -> int:
            return len(records)

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return embedder.transform(records[index].image), records[index].label or 0

    loader = torch.utils.data.DataLoader(Pictures(), batch_size=32)
    templates = [template.replace("{}", "{c}") for template in source.templates]
    expected = theirs.evaluate(
        embedder.model, loader, embedder.tokenize, list(source.class_names), templates, "cpu", amp=False
    )
    found = zero_shot(embedder, source, templates=source.templates, batch_size=64)
    assert found.result["metrics"] == pytest.approx(expected, abs=1e-12)
    assert len({round(value, 6) for value in expected.values()}) == 3 and all(0 < x < 1 for x in expected.values())
    assert found.result["task"] == "zeroshot_classification"
    assert {key: found.result[key] for key in ("templates", "classes", "images", "skipped")} == {
        "templates": 5, "classes": 10, "images": 150, "skipped": 0,
    }  # fmt: skip


def scattered(K: int = 200, C: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Return images that resemble their classes somewhat. A few classes have few images, and one has none."""
    classes = F.normalize(torch.randn(C, 16), dim=1)
    labels = (torch.rand(K) ** 2 * (C - 1)).long()
    return F.normalize(classes[labels] + 0.5 * torch.randn(K, 16), dim=1), classes, labels


def named(C: int) -> list[str]:
    return [f"class {k}" for k in range(C)]


@pytest.mark.filterwarnings("ignore:y_pred contains classes")  # one class has no image
@pytest.mark.parametrize("C", [4, 5, 12])
def test_metrics_are_scikit_learns(C: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images, classes, labels = scattered(C=C)
    ranks = class_ranks(images, classes, labels, named(C))
    best = (images @ classes.T).topk(min(5, C)).indices
    metrics = classification_metrics(ranks, labels, C)
    assert metrics["acc1"] == pytest.approx(float((best[:, 0] == labels).double().mean()))
    in_five = float((best == labels[:, None]).any(1).double().mean())
    assert metrics["acc5"] == (pytest.approx(in_five) if C >= 5 else None)
    assert metrics["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(labels, best[:, 0]))
    predictions = predicted_classes(images, classes, labels, ranks, named(C))
    assert torch.equal(predictions, best[:, 0])
    expected = confusion_matrix(labels, best[:, 0], labels=range(C))
    assert confusion(labels, predictions, C).tolist() == expected.tolist()
    monkeypatch.setattr(classification, "_CHUNK", 7 * C)
    assert torch.equal(predicted_classes(images, classes, labels, ranks, named(C)), predictions)


@pytest.mark.parametrize("processor", [nullcontext, RoundsByPlace])
def test_model_that_tells_nothing_apart_has_no_hit(processor: Callable[[], Any]) -> None:
    images, classes, labels = torch.ones(30, 8), torch.ones(6, 8), torch.zeros(30, dtype=torch.int64)
    with processor():
        ranks = class_ranks(images, classes, labels, named(6))
        predictions = predicted_classes(images, classes, labels, ranks, named(6))
    assert classification_metrics(ranks, labels, 6) == {"acc1": 0, "acc5": 0, "mean_per_class_recall": 0}
    assert predictions.tolist() == [1] * 30  # the first of the other classes
    classes[2] = float("nan")
    assert classification_metrics(class_ranks(images, classes, labels, named(6)), labels, 6)["acc1"] == 0


@pytest.mark.parametrize("processor", [nullcontext, RoundsByPlace])
def test_classes_of_one_name_are_an_argmaxs(embedder: Embedder, processor: Callable[[], Any]) -> None:
    """Images of classes with the same name are hits as often as an argmax makes them. CLIP's list for ImageNet contains
    "missile" and "sunglasses" twice, so half of their images are hits.
    """
    names = ["missile", "boat", "sunglasses", "missile", "sunglasses", "car"]
    classes = class_embeddings(embedder, names, ["a {}", "the {}"])
    assert torch.equal(classes[0], classes[3]) and torch.equal(classes[2], classes[4])
    labels = torch.arange(6).repeat(40)
    images = F.normalize(classes[labels] + 0.3 * torch.randn(240, embedder.dim), dim=1)
    # classes of the same name are equal to the last bit
    cosines = (images.double() @ classes.double().T)[:, [0, 1, 2, 0, 2, 5]]
    best = cosines.argmax(1)  # the first of equal classes
    assert torch.isin(best[(labels == 1) | (labels == 5)], torch.tensor([0, 2])).any()
    with processor():
        ranks = class_ranks(images, classes, labels, names)
        predictions = predicted_classes(images, classes, labels, ranks, names)
    assert torch.equal(predictions, best)
    metrics = classification_metrics(ranks, labels, 6)
    assert metrics["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(labels, best))
    assert ((ranks == 0) & (labels == 0)).any() and not ((ranks == 0) & (labels == 3)).any()
    order = cosines.argsort(dim=1, descending=True, stable=True)
    assert torch.equal(ranks, (order == labels[:, None]).int().argmax(1))


def test_class_is_the_mean_of_its_captions_directions(embedder: Embedder) -> None:
    found = class_embeddings(embedder, ["cat", "dog"], ["a {}", "many {}", "{} and no more"])
    for name, row in zip(("cat", "dog"), found):
        texts = [f"a {name}", f"many {name}", f"{name} and no more"]
        rows = [F.normalize(embedder.model.encode_text(embedder.tokenize([text])), dim=1)[0] for text in texts]
        torch.testing.assert_close(row, F.normalize(sum(rows), dim=0).detach())  # type: ignore[arg-type]


def test_templates_are_open_clips_or_of_a_file(tmp_path: Path) -> None:
    import open_clip

    for name, theirs in (
        ("openai", open_clip.OPENAI_IMAGENET_TEMPLATES),
        ("simple", open_clip.SIMPLE_IMAGENET_TEMPLATES),
    ):
        assert [one.format("red fox") for one in read_templates(name)] == [one("red fox") for one in theirs]
    file = tmp_path / "templates.txt"
    file.write_text("\ufeffa {c}\n\n  the {} \n", encoding="utf-8")
    assert read_templates(str(file)) == ("a {}", "the {}")
    for text, message in (
        ("a {}\na dog\n", "line 2: 'a dog' must contain {} once"),
        ("{} and {}\n", "line 1"),
        ("a {name}\n", "line 1"),
        ("a {} {0}\n", "line 1"),
        (" \n", "contains no template"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_templates(str(file))
    file.write_bytes(b"a \xff {}")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_templates(str(file))
    with pytest.raises(FileNotFoundError, match="openai or simple"):
        read_templates("imagenet")


def test_templates_are_the_sources_where_it_has_some(tmp_path: Path) -> None:
    source = open_labelled("digits")
    assert templates_for(source) == source.templates and len(templates_for(source, "openai")) == 80
    plain = open_labelled(str(class_folder(tmp_path, ("cat", "dog"))))
    assert plain.captions(0) == ("a photo of a cat",) and len(templates_for(plain)) == 80
    plain.templates = ("a photo of a {}",)  # the source's own templates take precedence over the default
    assert templates_for(plain) == plain.templates == templates_for(Subset(plain, [0]))


def class_folder(folder: Path, names: tuple[str, ...], each: int = 2) -> Path:
    source = open_source("digits", held_out=True)
    for k, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            source[each * k + i].image.save(folder / name / f"{i}.png")
    return folder


def test_pictures_without_a_class_are_left_out(
    embedder: Embedder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    needs("hf")
    import datasets

    source = digits(12)
    rows = {"image": [source[i].image for i in range(12)], "label": [source[i].label for i in range(11)] + [-1]}
    labels = datasets.ClassLabel(names=list(source.class_names))
    columns = datasets.Features({"image": datasets.Image(), "label": labels})
    datasets.Dataset.from_dict(rows, features=columns).save_to_disk(tmp_path / "set")
    hub = open_labelled(f"hf:{tmp_path / 'set'}")
    with caplog.at_level(logging.WARNING):
        found = zero_shot(embedder, hub, templates=source.templates)
    whole = zero_shot(embedder, Subset(source, range(11)), templates=source.templates)
    assert found.result["metrics"] == whole.result["metrics"]
    assert (found.result["images"], found.result["skipped"]) == (11, 1)
    assert "cannot be used" in caplog.text or "without a class" in caplog.text


def test_model_without_finite_numbers_is_refused(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_labelled(str(class_folder(tmp_path, ("a b", "a_b", "c"))))
    caplog.set_level(logging.INFO)
    zero_shot(embedder, source, templates=["{}"])
    assert "several classes share a name and cannot be distinguished: a b" in caplog.text
    images, texts = embedder.embed_images, embedder.embed_texts
    with monkeypatch.context() as patch:
        patch.setattr(embedder, "embed_images", lambda inputs: images(inputs) * torch.nan)
        with pytest.raises(ValueError, match="the model's features are not finite"):
            zero_shot(embedder, source, templates=["{}"])
    monkeypatch.setattr(embedder, "embed_texts", lambda inputs, **options: texts(inputs) * torch.nan)
    with pytest.raises(ValueError, match=r"the classes of .*: the model's features are not finite"):
        zero_shot(embedder, source, templates=["{}"])


def test_details_tell_what_a_class_is_taken_for(embedder: Embedder) -> None:
    source = digits()
    found = zero_shot(embedder, source, templates=source.templates)
    rows = class_accuracies(found, source.class_names)
    assert [row["name"] for row in rows] == list(source.class_names)
    assert sum(row["images"] for row in rows) == 150
    mean = sum(row["acc1"] for row in rows) / 10
    assert mean == pytest.approx(found.result["metrics"]["mean_per_class_recall"])
    matrix = confusion(found.labels, found.predictions, 10)
    for k, row in enumerate(rows):
        assert row["acc1"] == int(matrix[k, k]) / row["images"]
        for taken in row["taken_for"]:
            assert taken["images"] == matrix[k, source.class_names.index(taken["name"])] > 0
            assert taken["name"] != row["name"]
        others = sorted([int(n) for i, n in enumerate(matrix[k]) if i != k and n], reverse=True)
        assert [taken["images"] for taken in row["taken_for"]] == others[:3]


def test_details_of_many_classes_need_no_matrix_of_them() -> None:
    names = [str(k) for k in range(10**6)]  # a matrix of confusions would have 8 TB
    labels, predictions = torch.tensor([7, 7, 7, 7, 10**6 - 1]), torch.tensor([9, 8, 9, 7, 0])
    rows = class_accuracies(ZeroShot({}, labels, predictions, torch.arange(5)), names)
    taken = [{"name": "9", "images": 2}, {"name": "8", "images": 1}]
    assert rows[7] == {"name": "7", "images": 4, "acc1": 0.25, "taken_for": taken}
    assert rows[-1] == {"name": "999999", "images": 1, "acc1": 0.0, "taken_for": [{"name": "0", "images": 1}]}
    assert rows[8] == {"name": "8", "images": 0, "acc1": None, "taken_for": []} and len(rows) == 10**6


@pytest.fixture
def checkpoint(embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTCLIP_CACHE", str(tmp_path / "cache"))
    embedder.model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def command(checkpoint: Path, *words: object, task: str = "zeroshot") -> int:
    options = ["--checkpoint", checkpoint, "--device", "cpu", "--workers", "0"]
    return main(["eval", task, *map(str, (*options, *words))])


def test_command_writes_clip_benchmarks_json(
    checkpoint: Path, embedder: Embedder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, details = tmp_path / "new" / "r.json", tmp_path / "d.json"
    assert command(checkpoint, "--data", "digits", "--output", output, "--details", details) == 0
    told = json.loads(output.read_text())
    source = open_source("digits", held_out=True)
    assert told["metrics"] == zero_shot(embedder, source, templates=source.templates).result["metrics"]
    assert told["dataset"] == "digits" and told["pretrained"] == str(checkpoint) and told["images"] == 360
    assert {"dataset", "model", "pretrained", "task", "metrics"} <= told.keys()
    assert len(json.loads(details.read_text())) == 10
    printed = capsys.readouterr().out.split()
    assert printed[:6] == ["data", "classes", "images", "acc1", "acc5", "mean_per_class_recall"]
    assert printed[6:10] == ["digits", "10", "360", f"{100 * told['metrics']['acc1']:.1f}"]
    assert not list((tmp_path / "cache" / "features").iterdir())  # no files for resuming remain


def test_command_goes_on_after_a_stop(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(features, "PART", 64)
    words: list[Any] = ["--data", "digits", "--batch-size", 32, "--output"]
    assert command(checkpoint, *words, tmp_path / "whole.json") == 0
    real, calls = Embedder.embed_images, [0]

    def counted(self: Embedder, images: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == 6:
            raise KeyboardInterrupt
        return real(self, images)

    monkeypatch.setattr(Embedder, "embed_images", counted)
    assert command(checkpoint, *words, tmp_path / "r.json") == 130  # the shell's exit status after Ctrl-C
    assert not (tmp_path / "r.json").exists() and calls[0] == 6
    with caplog.at_level(logging.INFO, "fastclip"):
        assert command(checkpoint, *words, tmp_path / "r.json") == 0
    assert "128 of 360 images are embedded already" in caplog.text
    assert calls[0] == 6 + 8  # the remaining 232 images in batches of 32
    assert (tmp_path / "r.json").read_text() == (tmp_path / "whole.json").read_text()


def test_other_classes_are_not_taken_from_a_stopped_run(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features of a stopped run are not reused for other classes, because they are stored with the labels."""
    folder = class_folder(tmp_path / "pictures", ("n01440764", "n01443537", "n01484850"))
    monkeypatch.setattr("fastclip.evaluation.results.write_results", lambda *_: 1 / 0)
    (tmp_path / "templates.txt").write_text("a {}")
    words = ("--data", folder, "--templates", tmp_path / "templates.txt")
    with pytest.raises(ZeroDivisionError):
        command(checkpoint, *words, "--output", tmp_path / "r.json")
    assert len(list((tmp_path / "cache" / "features").iterdir())) == 2
    monkeypatch.undo()
    monkeypatch.setenv("FASTCLIP_CACHE", str(tmp_path / "cache"))
    # not all classes are in -R
    assert command(checkpoint, *words, "--classes", "imagenet-r", "--output", tmp_path / "r.json") == 1
    assert command(checkpoint, *words, "--classes", "imagenet", "--output", tmp_path / "r.json") == 0
    assert json.loads((tmp_path / "r.json").read_text())["classes"] == 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "FLAT"], "2 images and no class folders; images must be in one folder per class"),
        (["--data", "SHARDS"], "'SHARDS' is not a dataset"),
        (["--data", "digits", "--classes", "FILE"], "has 2 names, but digits has 10 classes"),
        (["--data", "digits", "--templates", "FILE"], "line 1: 'a' must contain {} once"),
    ],
)
def test_command_says_what_can_be_mended(
    words: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class_folder(tmp_path, ("FLAT",))
    (tmp_path / "FILE").write_text("a\nb\n")
    words = [str(tmp_path / word) if word in ("FLAT", "FILE") else word for word in words]
    capsys.readouterr()
    assert command(checkpoint, *words) == 1
    said = capsys.readouterr()
    assert message in said.err and not said.out
