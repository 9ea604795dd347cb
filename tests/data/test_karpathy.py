"""Karpathy's split files: the images of a split, their locations, and the errors for files of another kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support import needs

needs("train")
import numpy as np
import torch
from PIL import Image

from fastclip.data import evaluation_batches, open_source, training_batches
from fastclip.data.faults import BadSample, Tally
from fastclip.data.identity import fingerprint
from fastclip.data.sources.karpathy import Karpathy
from support.crops import split_file, write_crops

SPLITS = ("train", "restval", "val", "test")


def images(names: list[str], **more: str) -> list[dict[str, Any]]:
    """Return entries in which image k is in split k modulo 4 and has 1 + k modulo 3 captions."""
    return [
        {"filename": name, "split": SPLITS[k % 4], "sentences": [f"{name} as {c}" for c in range(1 + k % 3)], **more}
        for k, name in enumerate(names)
    ]


@pytest.mark.parametrize("place", ["", "images", "flickr30k-images", "val2014", "images/val2014"])
def test_split_has_its_pictures_and_captions(tmp_path: Path, place: str) -> None:
    names = write_crops(tmp_path / place)
    file = split_file(tmp_path / "dataset_flickr30k.json", images(names, filepath="val2014"))
    source = open_source(f"{file}:test")
    assert isinstance(source, Karpathy) and source.dataset == "flickr30k" and source.splits == ("test",)
    wanted = [k for k in range(24) if k % 4 == 3]
    assert len(source) == 6
    for i, k in enumerate(wanted):
        record = source[i]
        assert record.captions == source.captions(i) == tuple(f"{names[k]} as {c}" for c in range(1 + k % 3))
        assert record.key == source.key(i) == str(tmp_path / place / names[k])
        assert record.label is None
        with Image.open(record.key) as expected:
            assert np.array_equal(np.array(record.image), np.array(expected))
        assert source.picture_bytes(i) == Path(record.key).read_bytes()


def test_pictures_of_another_folder(tmp_path: Path) -> None:
    names = write_crops(tmp_path / "elsewhere" / "val2014")
    file = split_file(tmp_path / "dataset_coco.json", images(names, filepath="val2014"), "coco")
    with pytest.raises(
        ValueError, match=r"none of 6 images is in .*; the first is china3.jpg. Name their folder: .*:FOLDER"
    ):
        open_source(f"{file}:test")
    source = open_source(f"{file}:test:{tmp_path / 'elsewhere'}")
    assert source.key(0) == str(tmp_path / "elsewhere" / "val2014" / "china3.jpg")


def test_several_splits_and_training(tmp_path: Path) -> None:
    names = write_crops(tmp_path)
    file = split_file(tmp_path / "dataset_coco.json", images(names))
    both = open_source(f"{file}:train+restval")
    assert [Path(both.key(i)).name for i in range(len(both))] == [name for k, name in enumerate(names) if k % 4 < 2]
    assert len(open_source(f"{file}:train::{file}:restval")) == 12

    def transform(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image.resize((4, 4)))).permute(2, 0, 1) / 255

    def tokenize(texts: list[str]) -> torch.Tensor:
        assert all(" as " in text for text in texts)
        return torch.zeros(len(texts), 2, dtype=torch.int64)

    (step,) = training_batches(both, transform, tokenize, batch_size=12, first_step=0, last_step=1, seed=0)
    assert sorted(step_keys := [key for batch in step for key in batch.keys]) == sorted(map(both.key, range(12)))
    assert len(step_keys) == 12


def test_picture_that_is_missing_or_has_no_caption_is_a_fault(tmp_path: Path) -> None:
    names = write_crops(tmp_path)
    listed = images([*names[:3], "gone.jpg"])
    listed[1]["sentences"] = ["  ", ""]
    listed[2]["sentences"] = [" blanks at the ends\n"]
    for image in listed:
        image["split"] = "test"
    source = open_source(f"{split_file(tmp_path / 'dataset_x.json', listed)}:test")
    with pytest.raises(BadSample, match="its caption is empty"):
        source.captions(1)
    assert source.captions(2) == ("blanks at the ends",)
    skipped = Tally()
    (batch,) = evaluation_batches(source, lambda image: torch.zeros(3, 2, 2), batch_size=4, skipped=skipped)
    assert batch[1].tolist() == [0, -1, 2, -1]
    assert skipped.counts == {"empty caption": 1, "missing file": 1}


@pytest.mark.fault(
    "A JSON file names an image with a file name that no disk can have", "The sample is counted as an unreadable file"
)
def test_name_that_no_disk_can_have_is_a_fault(tmp_path: Path) -> None:
    good, prints = write_crops(tmp_path)[0], list[str]()
    # The last name is a single byte, which a disk may have
    for name, cause in (("\ud800.jpg", "unread"), ("\ud801.jpg", "unread"), ("\udce9.jpg", "missing")):
        listed = [image | {"split": "test", "sentences": ["a cat"]} for image in images([good, name])]
        source = open_source(f"{split_file(tmp_path / 'dataset_x.json', listed)}:test")
        with pytest.raises(BadSample) as caught:
            source[1]
        assert caught.value.fault.cause.startswith(cause) and name in caught.value.fault.key
        prints.append(fingerprint(source))
    assert len(set(prints)) == 3


IMAGE = {"filename": "a.jpg", "split": "test", "sentences": [{"raw": "a"}]}


@pytest.mark.parametrize(
    ("content", "spec", "message"),
    [
        ("{", ":test", "dataset_x.json is not JSON"),
        ('{"images": ' + "[" * 100_000, ":test", "dataset_x.json is not JSON"),
        ('{"images": [' + "9" * 5000 + "]}", ":test", "dataset_x.json is not JSON"),
        ('{"images": [NaN]}', ":test", "its image 0 must have"),
        ("[]", ":test", "dataset_x.json must hold an object"),
        ({"images": []}, ":test", 'no list "images"'),
        ({"images": [IMAGE, {"file_name": "b.jpg"}]}, ":test", 'its image 1 must have "filename", "split" and'),
        ({"images": [IMAGE | {"sentences": ["a"]}]}, ":test", "its image 0 must have"),
        ({"images": [IMAGE | {"split": 3}]}, ":test", "its image 0 must have"),
        ({"images": [IMAGE, IMAGE]}, "", r"name a split, as in .*dataset_x.json:test; .* has test \(2\)"),
        ({"images": [IMAGE]}, ":", "name a split"),
        ({"images": [IMAGE]}, ":tset", r"there is no split 'tset'; .* has test \(1\)"),
        ({"images": [IMAGE]}, ":test+val", "there is no split 'val'"),
        ({"images": [IMAGE]}, ":test", "none of 1 images is in"),
    ],
)
def test_what_is_no_split_raises(tmp_path: Path, content: Any, spec: str, message: str) -> None:
    file = tmp_path / "dataset_x.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        open_source(f"{file}{spec}")
    with pytest.raises(FileNotFoundError, match=r"gone\.json"):
        open_source(f"{tmp_path}/gone.json:test")
