"""Linear probes compared with scikit-learn used directly, on handwritten digits."""

from __future__ import annotations

import json
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from support import needs

needs("train")
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, top_k_accuracy_score
from sklearn.model_selection import train_test_split

from fastclip.cli import main
from fastclip.data.source import Record, Source
from fastclip.data.sources.subset import Subset
from fastclip.data.spec import open_source
from fastclip.embedding.features import FeatureStore, ImageFeatures
from fastclip.evaluation import probe
from fastclip.evaluation.classification import classification_metrics, classifier_accuracies, score_ranks
from fastclip.evaluation.probe import TowerEmbedder, linear_probe, sweep
from fastclip.evaluation.published import TOP1, top1, top1_dataset
from fastclip.models import create_model
from fastclip.models.classifier import ImageClassifier
from fastclip.models.embedder import Embedder
from fastclip.models.tokenizers.clip import ClipTokenizer
from support.rounding import RoundsByPlace

TOWERS = ("ViT-tiny", "RN-tiny", "align-tiny", "florence-tiny")


@pytest.fixture(scope="module")
def digits() -> dict[str, Source]:
    train, test = open_source("digits"), open_source("digits", held_out=True)
    parts = {"train": range(300), "val": range(300, 420)}
    return {name: Subset(train, part) for name, part in parts.items()} | {"test": Subset(test, range(150))}


def by_hand(embedder: Embedder, source: Source, features: str) -> tuple[Any, Any]:
    """Return the inputs of the tower's last projection, or unit vectors, and the labels."""
    model, seen = embedder.model, []
    hook = model.visual.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    records = [source[i] for i in range(len(source))]
    with torch.no_grad():
        out = model.encode_image(torch.stack([embedder.transform(record.image) for record in records]), normalize=True)
    hook.remove()
    return (seen[0] if features == "tower" else out).double().numpy(), np.array([record.label for record in records])


@pytest.mark.parametrize(("features", "with_val"), [("tower", False), ("embedding", True)])
def test_probe_equals_scikit_learn_by_hand(
    embedder: Embedder,
    digits: dict[str, Source],
    features: Any,
    with_val: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The fit uses the features that the probe read. Features of other batches differ in the last digit, from which
    # L-BFGS would reach another point of a plateau.
    real, read = probe.image_features, list[ImageFeatures]()
    monkeypatch.setattr(probe, "image_features", lambda *a, **o: read.append(real(*a, **o)) or read[-1])
    found = linear_probe(
        embedder, digits["train"], digits["test"], val=digits["val"] if with_val else None, features=features
    )
    for one, name in zip(read, ("train", "test", "val")):
        expected, labels = by_hand(embedder, digits[name], features)
        np.testing.assert_allclose(one.features, expected, rtol=1e-4, atol=1e-5)
        assert one.labels.tolist() == labels.tolist()
    (x, y), (x_test, y_test), *val = ((one.features.double().numpy(), one.labels.numpy()) for one in read)
    if with_val:
        ((x_val, y_val),) = val
    else:
        x, x_val, y, y_val = train_test_split(x, y, test_size=0.2, stratify=y, random_state=0)

    def fit(inputs: Any, labels: Any, penalty: float) -> LogisticRegression:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return LogisticRegression(C=1 / penalty, max_iter=1000).fit(inputs, labels)

    for penalty, score in found.sweep:
        assert fit(x, y, penalty).score(x_val, y_val) == pytest.approx(score), penalty
    best = found.metrics["weight_decay"]
    assert max(found.sweep, key=lambda one: one[1])[1] == dict(found.sweep)[best]
    last = fit(np.concatenate([x, x_val]), np.concatenate([y, y_val]), best)
    scores = last.decision_function(x_test)
    assert found.metrics["lp_acc1"] == pytest.approx(accuracy_score(y_test, scores.argmax(1)))
    assert found.metrics["lp_acc5"] == pytest.approx(top_k_accuracy_score(y_test, scores, k=5))
    assert found.metrics["lp_mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(y_test, scores.argmax(1)))
    assert found.metrics["normalized"] is (features == "embedding")
    assert found.metrics["lp_acc1"] > 0.7  # better than chance, 0.1


def test_sweep_is_the_papers() -> None:
    tried: list[float] = []

    def score(penalty: float) -> float:
        tried.append(penalty)
        return -abs(math.log10(penalty) - 2.6)

    best, scores = sweep(score)
    assert tried[:7] == pytest.approx([1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6])
    assert tried[7:] == pytest.approx([10**k for k in (1, 3, 2.5, 3.5, 2.25, 2.75, 2.375, 2.625)])
    assert best == pytest.approx(10**2.625)  # the nearest eighth of a decade
    assert [penalty for penalty, _ in scores] == tried and len(set(tried)) == len(tried)


@pytest.mark.parametrize(("score", "best"), [(lambda x: x, 1e6), (lambda x: -x, 1e-6), (lambda x: 1.0, 1.0)])
def test_sweep_stays_in_its_range_and_amid_a_plateau(score: Any, best: float) -> None:
    found, tried = sweep(score)
    assert found == pytest.approx(best)
    assert all(1e-6 <= penalty <= 1e6 for penalty, _ in tried)


@pytest.mark.parametrize("name", TOWERS)
def test_tower_features_are_those_before_the_projection(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name)
    assert model.config is not None
    images = torch.randn(3, 3, *[model.config.vision_cfg.image_size] * 2)
    taken = TowerEmbedder(model, ClipTokenizer())
    found = taken.embed_images(images)
    projection: Any = {"ViT-tiny": lambda: model.visual.head, "florence-tiny": lambda: model.visual.head.fc}
    with torch.no_grad():
        whole = model.encode_image(images)
        projected = projection[name]()(found) if name in projection else found
    torch.testing.assert_close(projected, whole)
    assert not torch.allclose(found.norm(dim=1), torch.ones(3), atol=1e-3)


def of_classes(source: Source, classes: set[int], size: int) -> Subset:
    return Subset(source, [i for i in range(len(source)) if source[i].label in classes][:size])


def test_class_that_was_not_trained_on_is_missed(embedder: Embedder) -> None:
    train, test = open_source("digits"), open_source("digits", held_out=True)
    seen, both = of_classes(train, {1, 2, 6}, 120), of_classes(test, {1, 6, 9}, 60)
    found = linear_probe(embedder, seen, both)
    share = sum(both[i].label == 9 for i in range(len(both))) / len(both)
    assert 0.9 * (1 - share) < found.metrics["lp_acc1"] <= 1 - share
    assert found.metrics["lp_mean_per_class_recall"] <= 2 / 3 + 1e-9
    two = linear_probe(embedder, of_classes(train, {3, 7}, 80), of_classes(test, {3, 7}, 40))
    assert two.metrics["lp_acc1"] > 0.9


class Unlabelled(Subset):
    def read(self, index: int, *, min_side: int | None = None) -> Record:
        return super().read(index, min_side=min_side)._replace(label=None)


def test_labels_that_do_not_fit_are_told(embedder: Embedder, caplog: pytest.LogCaptureFixture) -> None:
    source, test = open_source("digits"), open_source("digits", held_out=True)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=f"seed must be between 0 and 4294967295, got {seed}"):
            linear_probe(embedder, source, test, seed=seed)
    few = of_classes(test, {3, 5, 8}, 6)
    with pytest.raises(ValueError, match="digits: the usable images must have at least two classes, got 1"):
        linear_probe(embedder, of_classes(source, {3}, 8), few)
    linear_probe(embedder, of_classes(source, {3, 5}, 20), few, features="embedding")
    assert "1 class of digits without images in digits: eight" in caplog.text
    unnamed = Unlabelled(few, range(6))
    for options in ({"test": unnamed}, {"test": few, "val": unnamed}):
        with pytest.raises(ValueError, match="digits: none of the images has a class"):
            linear_probe(embedder, of_classes(source, {3, 5}, 20), **options)


def test_ranks_count_ties_against_the_model_and_metrics_are_scikit_learns() -> None:
    scores = torch.tensor([[1.0, 1.0, 0.0], [2.0, 1.0, 0.0], [math.nan, 1.0, 0.0], [math.nan, 1.0, 0.0]])
    assert score_ranks(scores, torch.tensor([0, 0, 0, 1])).tolist() == [1, 0, 2, 1]
    scores, labels = torch.randn(300, 9), torch.randint(0, 8, (300,))  # class 8 has no images
    found = classification_metrics(score_ranks(scores, labels), labels, 9)
    predictions = scores.argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the class without images
        assert found["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(labels, predictions))
    assert found["acc1"] == pytest.approx(accuracy_score(labels, predictions))
    assert found["acc5"] == pytest.approx(top_k_accuracy_score(labels, scores.numpy(), k=5, labels=range(9)))
    assert classification_metrics(score_ranks(scores[:, :4], labels % 4), labels % 4, 4)["acc5"] is None


def test_classes_of_equal_weights_tie(embedder: Embedder, digits: dict[str, Source]) -> None:
    """Classes of equal weights, such as two classes of one name, tie: rounding makes either one more
    likely, and neither counts as a hit.
    """
    torch.manual_seed(0)
    source = Subset(digits["test"], range(40))
    weight = 100 * torch.nn.functional.normalize(torch.randn(10, embedder.dim), dim=1)
    model = create_model("ViT-tiny")
    with RoundsByPlace():
        alike = ImageClassifier(model.visual, weight[:1].expand(10, -1), source.class_names)
        assert set(classifier_accuracies(alike, embedder, source).values()) == {0}
        twins = ImageClassifier(model.visual, weight[[0, 1, 2, 3, 4] * 2], source.class_names)
        ranks = score_ranks(twins(torch.randn(5, 3, 32, 32)), torch.arange(5), size=twins.largest_score())
    assert (ranks % 2 == 1).all() and len(ranks.unique()) > 1  # the other classes come in pairs
    assert twins.largest_score() == pytest.approx(100)


class Stopped(Exception):
    pass


def test_interrupted_probe_goes_on(
    embedder: Embedder, digits: dict[str, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTCLIP_CACHE", str(tmp_path))
    whole = linear_probe(embedder, digits["train"], digits["test"])
    assert not list(tmp_path.iterdir())  # nothing is stored unless requested
    stores: list[FeatureStore] = []
    real, fits = probe._fit, []

    def fit(*args: Any) -> Any:
        if len(fits) == 4:
            raise Stopped
        fits.append(args[2])
        return real(*args)

    monkeypatch.setattr(probe, "_fit", fit)
    with pytest.raises(Stopped):
        linear_probe(embedder, digits["train"], digits["test"], stores=stores)
    monkeypatch.setattr(probe, "_fit", lambda *args: fits.append(args[2]) or real(*args))
    monkeypatch.setattr(TowerEmbedder, "embed_images", None)  # all images are embedded already
    again = linear_probe(embedder, digits["train"], digits["test"], stores=stores)
    assert (again.metrics, again.sweep, again.converged) == (whole.metrics, whole.sweep, whole.converged)
    assert len(fits) == len(whole.sweep) + 1  # no fit is repeated
    for store in stores:
        store.clear()
    assert not list((tmp_path / "features").iterdir())


def test_fits_that_do_not_converge_are_told(
    embedder: Embedder, digits: dict[str, Source], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(probe, "_ITERATIONS", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = linear_probe(embedder, digits["train"], digits["test"])
    assert not found.converged and 0 < found.unconverged <= len(found.sweep)
    assert f"{found.unconverged} of {len(found.sweep)} fits" in caplog.text and "the final fit (lambda" in caplog.text


def test_data_that_do_not_fit_are_refused(
    embedder: Embedder, digits: dict[str, Source], caplog: pytest.LogCaptureFixture
) -> None:
    train = digits["train"]
    plain, other = Subset(train, range(10)), Subset(train, range(10))
    plain.class_names, other.class_names = (), ("zero", "one")
    with pytest.raises(ValueError, match="has no classes"):
        linear_probe(embedder, train, plain)
    with pytest.raises(ValueError, match="must have the same classes, but only one of them has eight, five"):
        linear_probe(embedder, train, other)
    other.class_names = train.class_names[::-1]
    with pytest.raises(ValueError, match="in another order"):
        linear_probe(embedder, train, other)
    with pytest.raises(ValueError, match=r"cannot be split for validation \(.*\): give a validation split"):
        linear_probe(embedder, Subset(train, range(12)), digits["test"])
    with caplog.at_level(logging.WARNING):
        linear_probe(embedder, train, Subset(train, range(40, 60)), val=digits["val"])
    assert "20 images of digits are also in digits" in caplog.text


def test_command_writes_clip_benchmarks_keys(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTCLIP_CACHE", str(tmp_path / "cache"))
    embedder.model.save_pretrained(tmp_path / "model")
    line = ["eval", "probe", "--checkpoint", str(tmp_path / "model"), "--data", "digits", "--test-data", "digits"]
    line += ["--workers", "0", "--device", "cpu", "--output", str(tmp_path / "r.json")]
    assert main([*line, "--reference", "pets"]) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    theirs = {"lp_acc1", "lp_acc5", "lp_mean_per_class_recall"}
    theirs |= {"weight_decay", "epochs", "seed", "fewshot_k", "normalized"}
    assert found["task"] == "linear_probe" and set(found["metrics"]) == theirs
    assert found["metric"] == "mean_per_class_recall"  # the metric of CLIP's paper for Pets
    table = capsys.readouterr().out
    assert f"{100 * found['metrics']['lp_acc1']:.1f}" in table and "ALIGN fine-tuned" in table and "96.2" in table
    assert not list((tmp_path / "cache" / "features").iterdir())
    assert main([*line, "--reference", "pest"]) == 1
    assert "no published results for 'pest'" in capsys.readouterr().err


def test_result_is_called_by_its_folder(
    embedder: Embedder, digits: dict[str, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result is named by its folder. A folder's name selects published numbers, but does not identify the data."""
    monkeypatch.setenv("FASTCLIP_CACHE", str(tmp_path / "cache"))
    embedder.model.save_pretrained(tmp_path / "model")
    for k in range(16):
        folder = tmp_path / "pets" / ("train" if k < 8 else "test") / "ab"[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        digits["train"][k].image.save(folder / f"{k}.png")
    test = str(tmp_path / "pets" / "test")
    line = ["eval", "probe", "--checkpoint", str(tmp_path / "model"), "--workers", "0", "--device", "cpu"]
    line += ["--data", str(tmp_path / "pets" / "train"), "--val-data", test, "--test-data", test]
    assert main([*line, "--output", str(tmp_path / "r.json")]) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["dataset"], found["metric"]) == (test, "mean_per_class_recall")


def test_published_numbers_are_by_name() -> None:
    assert top1("food101") == {
        "CLIP": 93.8,
        "Florence": 95.1,
        "CLIP fine-tuned": 95.9,
        "ALIGN fine-tuned": 95.9,
        "Florence fine-tuned": 96.2,
    }
    assert set(top1("dtd")) == set(TOP1) - {"ALIGN fine-tuned"}
    assert [len(values) for values in TOP1.values()] == [12, 12, 12, 4, 12]
    assert top1_dataset("/data/Food101/test") == top1_dataset("food101/") == "food101"
    for path in ("digits", "cars/scans", "pets/mine/test", "/imagenet/food101/10", ".", ""):
        assert top1_dataset(path) is None
