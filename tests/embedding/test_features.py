"""Features of a whole dataset: an interrupted computation resumes with the same result."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest

from support import needs

needs("train")
import torch
from torch import Tensor

from fastclip.data.faults import BadSample
from fastclip.data.identity import picture_states
from fastclip.data.picture import pixels_limited
from fastclip.data.source import Record
from fastclip.data.sources.subset import Subset
from fastclip.data.spec import open_source
from fastclip.embedding import features
from fastclip.embedding.features import FeatureStore, image_features, text_features
from fastclip.evaluation.results import result, table, write_lines, write_results
from fastclip.models import create_model
from fastclip.models.embedder import Embedder, load_embedder
from support.faulty import write_folder


class Stopped(Exception):
    pass


def stopping(embedder: Embedder, after: int) -> Embedder:
    """Return the embedder with towers that raise after `after` batches."""
    other = Embedder(embedder.model, embedder.tokenize)
    left = [after]

    def counted(real: Any) -> Any:
        def embed(*args: Any, **options: Any) -> Tensor:
            left[0] -= 1
            if left[0] < 0:
                raise Stopped
            return real(*args, **options)

        return embed

    other.embed_images = counted(other.embed_images)  # type: ignore[method-assign]
    other.embed_texts = counted(other.embed_texts)  # type: ignore[method-assign]
    return other


def test_interrupted_embedding_goes_on_to_the_same_bits(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "PART", 32)
    source = Subset(open_source("digits", held_out=True), range(100))
    whole = image_features(embedder, source, batch_size=16)
    assert whole.indices.tolist() == list(range(100)) and whole.features.shape == (100, embedder.dim)
    torch.testing.assert_close(whole.features.norm(dim=1), torch.ones(100))
    store = FeatureStore(embedder, [source.key(i) for i in range(100)], folder=tmp_path)
    with pytest.raises(Stopped):
        image_features(stopping(embedder, 5), source, batch_size=16, store=store)
    assert [len(part["used"]) for part in store.parts()] == [32, 32]  # the fifth batch was not written yet
    rest = stopping(embedder, 3)
    again = image_features(rest, source, batch_size=16, store=store)
    assert all(torch.equal(a, b) for a, b in zip(again, whole))
    assert all(torch.equal(a, b) for a, b in zip(image_features(stopping(embedder, 0), source, store=store), whole))
    store.clear()
    assert not list(tmp_path.iterdir()) and not store.parts()


def test_interrupted_texts_go_on_to_the_same_bits(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "PART", 8)
    texts = [f"a photo of {k}" for k in range(30)]
    whole = text_features(embedder, texts, batch_size=4)
    store = FeatureStore(embedder, texts, folder=tmp_path)
    with pytest.raises(Stopped):
        text_features(stopping(embedder, 5), texts, batch_size=4, store=store)
    assert torch.equal(text_features(stopping(embedder, 4), texts, batch_size=4, store=store), whole)
    torch.testing.assert_close(whole, embedder.embed_texts(texts))
    assert text_features(embedder, []).shape == (0, embedder.dim)


def test_damaged_part_is_computed_again(embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "PART", 8)
    texts = [f"a photo of {k}" for k in range(24)]
    store = FeatureStore(embedder, texts, folder=tmp_path)
    whole = text_features(embedder, texts, store=store)
    file = store.folder / "part-000008.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    assert len(store.parts()) == 1
    assert torch.equal(text_features(embedder, texts, store=store), whole)


def test_store_is_of_one_model_and_one_list(embedder: Embedder, tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = Embedder(create_model("ViT-tiny"), embedder.tokenize)
    rounded = Embedder(embedder.model, embedder.tokenize, precision="bf16")
    stores = [
        FeatureStore(e, keys, folder=tmp_path)
        for e, keys in ((embedder, ["a", "b"]), (other, ["a", "b"]), (rounded, ["a", "b"]), (embedder, ["ab"]))
    ]
    with pixels_limited(10**6):  # the limit determines which images can be read
        stores.append(FeatureStore(embedder, ["a", "b"], folder=tmp_path))
    assert len({store.folder for store in stores}) == 5
    assert FeatureStore(embedder, ["a", "b"], folder=tmp_path).folder == stores[0].folder


class Partly:
    """A source of digits in which chosen samples cannot be used."""

    spec, class_names, templates = "partly", ("zero",), ("a {}",)

    def __init__(self, bad: set[int], size: int = 20) -> None:
        self._digits, self._bad, self._size = open_source("digits"), bad, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Record:
        if index in self._bad:
            raise BadSample("damaged picture", self.key(index), "it ends too early")
        return self._digits[index]

    def captions(self, index: int) -> tuple[str, ...]:
        return self._digits.captions(index)

    def key(self, index: int) -> str:
        return f"partly/{index}"


def test_what_cannot_be_used_is_left_out_and_said(embedder: Embedder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fastclip"):
        found = image_features(embedder, Partly({3, 17}), batch_size=8)
    assert found.indices.tolist() == [i for i in range(20) if i not in (3, 17)]
    assert "2 of 20 images cannot be used and are left out" in caplog.text and "partly/3" in caplog.text
    with pytest.raises(ValueError, match="100 tries found no usable sample among 20 different samples"):
        image_features(embedder, Partly(set(range(20))), batch_size=8)


def test_embedder_of_a_checkpoint_is_the_model(embedder: Embedder, tmp_path: Path) -> None:
    embedder.model.save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "metrics.jsonl").touch()
    for path in (tmp_path / "run" / "model", tmp_path / "run"):  # a run of `fastclip train`
        loaded = load_embedder(path, device="cpu")
        assert loaded.identity == embedder.identity and loaded.name == str(path)
        assert torch.equal(loaded.embed_texts(["a cat"]), embedder.embed_texts(["a cat"]))
    (tmp_path / "run" / "model").rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"has not ended.*checkpoints/step-"):
        load_embedder(tmp_path / "run", device="cpu")


def test_results_are_json_whatever_the_numbers(tmp_path: Path) -> None:
    found = result(
        dataset="d", task="zeroshot_classification", model="m", pretrained="p", metrics={"acc1": float("nan")}
    )
    write_results(tmp_path / "new" / "r.json", found)
    write_lines(file := tmp_path / "other" / "r.jsonl", ({"x": value} for value in (float("-inf"), float("nan"), 0.5)))
    assert file.read_text() == '{"x": null}\n{"x": null}\n{"x": 0.5}\n'
    with pytest.raises(ZeroDivisionError):
        write_lines(file, ({"x": 1 / k} for k in (1, 0)))
    assert file.read_text().startswith('{"x": null}\n') and list(file.parent.iterdir()) == [file]
    assert '"acc1": null' in (tmp_path / "new" / "r.json").read_text()
    assert table(["model", "R@1"], [["ours", 12.34], ["a longer one", None]]).splitlines() == [
        "model          R@1",
        "ours          12.3",
        "a longer one     -",
    ]


def test_what_took_a_minute_is_kept(embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features are stored after a minute, however few they are: on a CPU, a large model takes a second per image."""
    monkeypatch.setattr(features, "_SECONDS", 0.0)
    source, texts = Subset(open_source("digits", held_out=True), range(12)), [f"a photo of {k}" for k in range(9)]
    pictures, captions = (FeatureStore(embedder, [name], folder=tmp_path) for name in ("pictures", "texts"))
    with pytest.raises(Stopped):
        image_features(stopping(embedder, 3), source, batch_size=3, store=pictures)
    with pytest.raises(Stopped):
        text_features(stopping(embedder, 3), texts, batch_size=2, store=captions)
    assert sum(len(part["used"]) for part in pictures.parts()) == 9
    assert sum(len(part["features"]) for part in captions.parts()) == 6
    whole = image_features(embedder, source, batch_size=3)
    assert torch.equal(image_features(embedder, source, batch_size=3, store=pictures).features, whole.features)
    torch.testing.assert_close(
        text_features(embedder, texts, batch_size=2, store=captions), embedder.embed_texts(texts)
    )


def test_names_in_another_folder_are_others(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def store(place: Path, spec: str) -> Path:
        monkeypatch.chdir(place)
        return FeatureStore(embedder, picture_states(open_source(spec)), folder=tmp_path).folder

    for name in "ab":
        write_folder(tmp_path / name / "data", 2)
    here = store(tmp_path / "a", "data")
    assert store(tmp_path / "b", "data") != here == store(tmp_path, "./a/data/")


def test_store_that_another_process_clears_is_no_error(embedder: Embedder, tmp_path: Path) -> None:
    ours, theirs = (FeatureStore(embedder, ["a"], folder=tmp_path / "new") for _ in range(2))
    ours.add(0, {"features": torch.ones(1, 2)})
    theirs.clear()
    ours.clear()
    ours.add(1, {"features": torch.ones(1, 2)})  # after a gap, the remaining part must not be taken for the beginning
    assert not theirs.parts()


@pytest.mark.fault(
    "Two evaluations of the same data run at the same time", "Neither uses a part of the other's features by mistake"
)
def test_two_writers_of_one_store_do_not_mix_their_parts(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two writers of one store do not mix their parts. A part is also closed after a minute, so a
    slower process writes shorter ones.
    """
    texts = [f"a photo of {k}" for k in range(20)]
    fast, slow = (FeatureStore(embedder, texts, folder=tmp_path) for _ in range(2))
    monkeypatch.setattr(features, "PART", 8)
    with pytest.raises(Stopped):
        text_features(stopping(embedder, 4), texts, batch_size=4, store=fast)  # two parts of 8
    # it opened the store before these parts were written
    slow.add(0, {"features": text_features(embedder, texts[:4], batch_size=4)})
    assert torch.equal(
        text_features(embedder, texts, batch_size=4, store=fast), text_features(embedder, texts, batch_size=4)
    )


@pytest.mark.fault("`FASTCLIP_CACHE` is not writable, or full", "One warning, and the evaluation continues")
def test_cache_that_cannot_be_written_is_no_error(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTCLIP_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(features, "PART", 2)
    store = FeatureStore(embedder, ["a"])
    assert len(text_features(embedder, ["a", "b", "c", "d"], batch_size=2, store=store)) == 4
    assert caplog.text.count("progress is not saved") == 1 and str(tmp_path / "file") in caplog.text
    store.clear()
    with pytest.raises(OSError, match="file"):  # the file to read must exist
        FeatureStore(embedder, ["a"], folder=tmp_path / "file").add(0, {"features": torch.ones(1, 1)})


def test_checkpoint_of_a_run_is_what_the_run_would_save(tmp_path: Path) -> None:
    """A checkpoint of a run equals the model that the run would save: its sizes, averaged
    weights, and no need for a name.
    """
    needs("train")
    from fastclip.training import TrainOptions, train

    values: dict[str, Any] = {"data": "digits", "model": "ViT-tiny", "context_length": 16, "workers": 0}
    values |= {"batch_size": 64, "max_steps": 3, "ema": 0.5, "device": "cpu", "output": str(tmp_path / "run")}
    train(TrainOptions(**values))
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    found, saved = (load_embedder(path, device="cpu") for path in (checkpoint, tmp_path / "run"))
    assert found.identity == saved.identity and found.tokenize(["a"]).shape == (1, 16)

    train(TrainOptions(**{**values, "max_steps": 9, "stop_after": 1, "resume": "auto"}))
    with pytest.raises(FileNotFoundError, match="has not ended"):  # model/ belonged to step 3
        load_embedder(tmp_path / "run", device="cpu")
    assert load_embedder(tmp_path / "run" / "aside-model", device="cpu").identity == saved.identity


def test_other_vocabulary_is_another_model(tmp_path: Path) -> None:
    needs("models")
    create_model("align-tiny").save_pretrained(tmp_path)
    (vocabulary,) = tmp_path.glob("*vocab*")
    before = load_embedder(tmp_path, device="cpu").identity
    words = vocabulary.read_text().splitlines()
    words[-1], words[-2] = words[-2], words[-1]
    vocabulary.write_text("\n".join(words) + "\n")
    assert load_embedder(tmp_path, device="cpu").identity != before


def test_half_of_a_process_that_died_is_removed(embedder: Embedder, tmp_path: Path) -> None:
    store = FeatureStore(embedder, ["a"], folder=tmp_path)
    store.add(0, {"features": torch.ones(1, 2)})
    half = store.folder / ".part-000001.safetensors.0a1b2c3d.tmp"
    half.touch()
    assert len(store.parts()) == 1 and half.exists()
    os.utime(half, (time.time() - 3700,) * 2)
    assert len(store.parts()) == 1 and not half.exists()
