"""Datasets of the `datasets` library, created by the tests; nothing is downloaded."""

from __future__ import annotations

import io
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from support import needs

needs("hf")

import datasets
import pyarrow as pa
from PIL import Image

from fastclip.data import BadSample, Source, open_source, training_batches
from fastclip.data.source import picture_place, sample_stamp


def picture(shade: int) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("L", (8, 4), shade).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def saved(path: Path, columns: dict[str, list[Any]], **features: Any) -> str:
    """Save a dataset whose first column contains images, and return its SPEC."""
    table = datasets.Dataset.from_dict(columns)
    for name, feature in ({next(iter(columns)): datasets.Image()} | features).items():
        table = table.cast_column(name, feature)
    table.save_to_disk(str(path))
    return f"hf:{path}"


def captions(source: Source) -> list[tuple[str, ...]]:
    found = [source.captions(index) for index in range(len(source))]
    assert [source[index].captions for index in range(len(source))] == found
    return found


def shades(source: Source) -> list[int]:
    assert all(source[index].image.size == (8, 4) for index in range(len(source)))
    return [source[index].image.getpixel((0, 0)) for index in range(len(source))]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(("image", "caption"), [("image", "text"), ("picture", "caption"), ("jpg", "Title")])
def test_hub_columns_are_found(tmp_path: Path, image: str, caption: str) -> None:
    rows = {image: [picture(3), picture(7)], "other": ["x", "y"], caption: ["a cat", " a dog\n"]}
    spec = saved(tmp_path / "d", rows)
    source = open_source(spec)
    assert source.spec == spec and source.class_names == source.templates == () and source[0].label is None
    assert captions(source) == [("a cat",), ("a dog",)] and shades(source) == [3, 7]
    assert source[1].key == f"{spec}, row 1"


def test_hub_columns_are_told_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = {"image": [picture(3)], "mask": [picture(9)], "caption": ["a"], "text": ["b"], "alt": ["c"]}
    spec = saved(tmp_path / "d", rows, mask=datasets.Image())
    assert captions(open_source(spec)) == [("a",)]
    assert caplog.messages == [
        f"{spec}: the column image is used, not mask; to use another, write {spec}#image=mask",
        f"{spec}: the column caption is used, not text; to use another, write {spec}#caption=text",
    ]
    source = open_source(f"{spec}#caption=alt,image=mask")
    assert captions(source) == [("c",)] and shades(source) == [9]
    assert captions(open_source(f"{spec}:train#image=image,caption=Text")) == [("b",)]
    with pytest.raises(ValueError, match="there is no column x among image, mask, caption, text, alt"):
        open_source(f"{spec}#caption=x")
    spec = saved(tmp_path / "e", {"image": [picture(3)], "text": ["x"], "size": [1]})
    with pytest.raises(ValueError, match="the column size holds no images"):
        open_source(f"{spec}#image=size")


@pytest.mark.fault(
    "A Hugging Face dataset was saved with a format, such as numpy", "It is read, without applying the format"
)
@pytest.mark.parametrize("kind", ["numpy", "pandas", "arrow", "torch", "columns", "indices"])
def test_hub_format_that_was_saved_is_not_applied(tmp_path: Path, kind: str) -> None:
    names = datasets.ClassLabel(names=["cat", "dog"])
    rows = {"image": [picture(3), picture(7)], "text": [["x", "y"], ["z"]], "label": [1, 0]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=kind != "torch"))
    table = table.cast_column("label", names)
    if kind == "indices":
        table = table.select([1, 0]).select([1, 0])
    else:
        table.set_format(columns=["label"]) if kind == "columns" else table.set_format(kind)
    for name, what in (("d", table), ("e", datasets.DatasetDict(train=table))):
        what.save_to_disk(str(tmp_path / name))
        source = open_source(f"hf:{tmp_path / name}")
        assert captions(source) == [("x", "y"), ("z",)] and shades(source) == [3, 7]
        assert [source[k].label for k in range(2)] == [1, 0] and type(source[0].label) is int


def test_hub_pictures_by_path_lie_beside_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "d").mkdir()
    lines = [json.dumps({"image": image, "text": "x"}) for image in ("a.png", None, "b.png")]
    (tmp_path / "d" / "train.jsonl").write_text("\n".join(lines))
    for folder, shade in ((tmp_path / "here", 3), (tmp_path / "d", 7)):
        (folder / "a.png").write_bytes(picture(shade)["bytes"])
        source = open_source(f"hf:{tmp_path / 'd'}")
        assert source[0].image.getpixel((0, 0)) == shade and source.picture_bytes(0) == picture(shade)["bytes"]
    with pytest.raises(BadSample, match="row 1: the row has no image"):
        source[1]
    with pytest.raises(BadSample, match="row 2: No such file"):
        source[2]
    before = [sample_stamp(source, k) for k in range(3)]
    (tmp_path / "d" / "b.png").write_bytes(b"x")
    assert [sample_stamp(source, k) == stamp for k, stamp in enumerate(before)] == [True, True, False]


def test_hub_places_are_told_without_reading_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = saved(tmp_path / "d", {"image": [picture(3), None, picture(4) | {"path": "b.png"}], "text": ["x"] * 3})
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "a.png").write_bytes(picture(9)["bytes"])
    lines = [json.dumps({"image": image, "text": "x"}) for image in ("a.png", None, "none.png")]
    (tmp_path / "named" / "train.jsonl").write_text("\n".join(lines))
    inside, named = open_source(spec), open_source(f"hf:{tmp_path}/named")
    with monkeypatch.context() as reading:
        reading.delattr(datasets.Dataset, "__getitem__")
        places = [[picture_place(source, k) for k in range(3)] for source in (inside, named)]
    assert {file for file, _ in places[0]} == {f"{tmp_path}/d/data-00000-of-00001.arrow"} and len({*places[0]}) == 3
    assert places[1][0][0] == f"{tmp_path}/named/a.png" and places[1][1][0].endswith(".arrow")
    assert places[1][2][0] == "none.png"
    assert [picture_place(pickle.loads(pickle.dumps(named)), k) for k in range(3)] == places[1]


def test_hub_captions_that_are_no_text_are_named(tmp_path: Path) -> None:
    source = open_source(saved(tmp_path / "d", {"image": [picture(3)], "text": [[*range(1000)]]}))
    with pytest.raises(BadSample, match=r"text must be a string or a list of strings, got \[0, 1, 2") as caught:
        source.captions(0)
    assert len(caught.value.fault.reason) < 200
    rows = {"image": [picture(3), picture(4)], "label": [0, 1]}
    source = open_source(saved(tmp_path / "e", rows, label=datasets.ClassLabel(names=["cat", "dog \ud83d"])))
    assert source.captions(0) == ("a photo of a cat",)
    with pytest.raises(BadSample, match="row 1: its class's name holds half a character"):
        source.captions(1)


def test_hub_captions_may_be_lists(tmp_path: Path) -> None:
    rows = {"image": [picture(3), picture(7)], "captions": [["a", " ", "b"], ["c"]]}
    assert captions(open_source(saved(tmp_path / "d", rows))) == [("a", "b"), ("c",)]


def test_hub_class_labels_are_classes(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["cat", "dog"])
    rows = {"image": [picture(3), picture(7), picture(9)], "label": [1, 0, -1], "text": ["x", "y", "z"]}
    source = open_source(saved(tmp_path / "d", rows, label=names))
    assert source.class_names == ("cat", "dog") and source.templates == ()
    assert [source[k].label for k in range(3)] == [1, 0, None] and captions(source) == [("x",), ("y",), ("z",)]
    del rows["text"]
    source = open_source(saved(tmp_path / "e", rows, label=names))
    assert [source.captions(k) for k in range(2)] == [("a photo of a dog",), ("a photo of a cat",)]
    with pytest.raises(BadSample, match="e, row 2: it has no caption"):
        source.captions(2)


def test_hub_numbers_that_have_no_names_are_no_classes(tmp_path: Path) -> None:
    source = open_source(saved(tmp_path / "d", {"image": [picture(3)], "label": [1], "text": ["x"]}))
    assert source.class_names == () and source[0].label is None


def test_hub_splits_are_named(tmp_path: Path) -> None:
    parts = {
        name: datasets.Dataset.from_dict({"image": [picture(shade)], "text": [name]}).cast_column(
            "image", datasets.Image()
        )
        for name, shade in (("train", 1), ("test", 2))
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "d"))
    assert captions(open_source(f"hf:{tmp_path}/d")) == [("train",)]
    assert captions(open_source(f"hf:{tmp_path}/d:test")) == [("test",)]
    assert len(open_source(f"hf:{tmp_path}/d::2*hf:{tmp_path}/d:test")) == 3
    with pytest.raises(ValueError, match=r"there is no split dev; splits are train, test"):
        open_source(f"hf:{tmp_path}/d:dev")


@pytest.mark.fault("A Hugging Face dataset has no rows", "An error names the dataset")
def test_hub_data_without_rows_is_named(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"image": [picture(1)], "text": ["x"]}).cast_column("image", datasets.Image())
    none = rows.select([])
    none.save_to_disk(str(tmp_path / "none"))
    datasets.DatasetDict({"train": rows, "test": none}).save_to_disk(str(tmp_path / "d"))
    rows.save_to_disk(str(tmp_path / "zero"))  # written as a file, as other versions of the library do
    (file,) = (tmp_path / "zero").glob("*.arrow")
    with pa.ipc.new_stream(str(file), rows.data.schema) as stream:
        stream.write_table(rows.data.table.slice(0, 0))
    for spec in ("none", "d:test", "zero"):
        with pytest.raises(ValueError, match=rf"^hf:.*/{spec}: the dataset has no rows"):
            open_source(f"hf:{tmp_path}/{spec}")
    assert captions(open_source(f"hf:{tmp_path}/d")) == [("x",)]


def test_hub_folder_of_pictures_and_captions(tmp_path: Path) -> None:
    folder = tmp_path / "d" / "train"
    folder.mkdir(parents=True)
    for k in range(3):
        (folder / f"{k}.png").write_bytes(picture(k)["bytes"])
    lines = [json.dumps({"file_name": f"{k}.png", "text": f"caption {k}"}) for k in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    source = open_source(f"hf:{tmp_path / 'd'}")
    assert captions(source) == [(f"caption {k}",) for k in range(3)] and shades(source) == [0, 1, 2]


def test_hub_source_goes_to_another_process(tmp_path: Path) -> None:
    source = open_source(saved(tmp_path / "d", {"image": [picture(3)], "text": ["x"]}))
    copied = pickle.loads(pickle.dumps(source))
    assert copied[0][1:] == source[0][1:] and copied[0].image.tobytes() == source[0].image.tobytes()


def test_hub_rows_are_read_by_workers(tmp_path: Path) -> None:
    needs("models")
    from torchvision.transforms import ToTensor

    rows = {"image": [picture(k) for k in range(8)], "text": [str(k) for k in range(8)]}
    source = open_source(saved(tmp_path / "d", rows))

    def tokenize(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[int(text)] for text in texts])

    steps = training_batches(source, ToTensor(), tokenize, batch_size=4, last_step=2, workers=2)
    batches = [batch for (batch,) in steps]
    assert sorted(torch.cat([batch.ids for batch in batches]).flatten().tolist()) == list(range(8))
    for batch in batches:
        assert (batch.images[:, 0, 0, 0] * 255).round().int().tolist() == batch.ids.flatten().tolist()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            {"image": [picture(0)], "words": ["x"]},
            "no column of captions (title, caption, text, captions) among image, w",
        ),
        ({"text": ["x"], "words": ["x"]}, "no column of images among text, words"),
    ],
)
def test_hub_columns_that_are_missing_are_named(tmp_path: Path, rows: dict[str, list[Any]], message: str) -> None:
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(ValueError, match=re.escape(f"hf:{tmp_path}/d: {message}")):
        open_source(f"hf:{tmp_path}/d")


@pytest.mark.fault(
    "A row of a Hugging Face dataset has no image or caption", "The sample is replaced and counted by cause"
)
def test_hub_row_that_cannot_be_used_has_its_cause(tmp_path: Path) -> None:
    broken = {"bytes": b"<html>", "path": None}
    rows = {"image": [picture(1), broken, None, None, picture(2)], "text": ["x", "x", "x", None, " "]}
    spec = saved(tmp_path / "d", rows)
    source = open_source(spec)
    for row, cause, message in (
        (1, "not an image", "not a readable image"),
        (2, "no image", "the row has no image"),
        (3, "no caption", "it has no caption"),
        (4, "empty caption", "its caption is empty"),
    ):
        with pytest.raises(BadSample, match=re.escape(f"{spec}, row {row}: {message}")) as caught:
            source[row]
        assert caught.value.fault.cause == cause and source.key(row) == caught.value.fault.key
    source = open_source(saved(tmp_path / "e", {"image": [picture(1)], "text": [3]}))
    with pytest.raises(BadSample, match="e, row 0: text must be a string or a list of strings, got 3") as caught:
        source.captions(0)
    assert caught.value.fault.cause == "damaged caption"


def test_hub_data_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=rf"^hf:{re.escape(str(tmp_path))}/none: "):
        open_source(f"hf:{tmp_path}/none")
