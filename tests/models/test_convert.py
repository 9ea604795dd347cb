"""Writing of checkpoints: whole or not at all, never over a source, and never mixed with files of another model."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from support import needs

needs("models")

import fastclip
from fastclip.cli import main
from fastclip.models import DualEncoder
from fastclip.models.classifier import ImageClassifier, load_classifier, save_classifier
from fastclip.models.convert import convert


@contextmanager
def no_room(size: int = 30_000) -> Iterator[None]:
    """Limit the size of written files to `size` bytes."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def states(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    torch.manual_seed(0)
    return fastclip.create_model("ViT-tiny")


@pytest.fixture(scope="module")
def other() -> DualEncoder:
    torch.manual_seed(1)
    return fastclip.create_model("ViT-tiny")


@pytest.mark.fault(
    "`fastclip convert` overwrites a model on a full disk",
    "The old files are unchanged, nothing is left beside them, and the error names the file",
)
@pytest.mark.parametrize(
    ("target", "form"),
    [
        ("x.pt", "open_clip"),
        ("x.safetensors", "open_clip"),
        ("x", "open_clip"),
        ("x", "huggingface"),
        ("x", "fastclip"),
    ],
)
def test_a_full_disk_leaves_the_old(
    target: str, form: str, model: DualEncoder, other: DualEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save_pretrained(tmp_path / "source")
    convert(other, tmp_path / target, form=form)
    for config in (tmp_path / target).glob("*.json"):  # a different configuration of the same size
        config.write_text(config.read_text().replace("0", "1", 1))
    before = states(tmp_path)
    argv = ["convert", str(tmp_path / "source"), str(tmp_path / target), "--to", form]
    with no_room():
        assert main(argv) == 1
    told = capsys.readouterr().err
    assert str(tmp_path / target) in told and told.count("\n") == 1 and ".tmp" not in told, told
    assert states(tmp_path) == before
    assert main(argv) == 0
    assert states(tmp_path).keys() == before.keys() and states(tmp_path) != before


def test_a_full_disk_leaves_nothing_new(model: DualEncoder, tmp_path: Path) -> None:
    with no_room(), pytest.raises(OSError, match="new"):
        model.save_pretrained(tmp_path / "new")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("way", ["itself", "symbolic link", "hard link", "folder", "inside", "link to the folder"])
def test_a_source_is_not_overwritten(
    way: str, model: DualEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(model, tmp_path / "x.safetensors", form="open_clip")
    model.save_pretrained(tmp_path / "folder")
    source, target, form = tmp_path / "x.safetensors", tmp_path / "y.safetensors", "open_clip"
    if way == "itself":
        target = source
    elif way == "symbolic link":
        target.symlink_to(source)
    elif way == "hard link":
        os.link(source, target)
    else:
        source = target = tmp_path / "folder"
        form = "fastclip"
        if way == "inside":
            target, form = target / "model.safetensors", "open_clip"
        elif way == "link to the folder":
            target = tmp_path / "link"
            target.symlink_to(source)
    before = states(tmp_path)
    assert main(["convert", str(source), str(target), "--to", form, "--model", "ViT-tiny"]) == 1
    assert f"{target} is the source that the model is read from" in capsys.readouterr().err
    assert states(tmp_path) == before


@pytest.mark.parametrize(("target", "form"), [("x.pt", "open_clip"), ("x", "open_clip"), ("x", "fastclip")])
def test_a_target_has_one_owner(
    target: str, form: str, model: DualEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save_pretrained(tmp_path / "source")
    place = tmp_path / target
    lock = tmp_path / ".x.pt.lock" if target == "x.pt" else place / ".fastclip.lock"
    lock.parent.mkdir(exist_ok=True)
    owner = {"host": "node-7", "pid": 12, "since": "2026-01-01", "command": "fastclip x", "start": "", "word": ""}
    lock.write_text(json.dumps(owner))
    argv = ["convert", str(tmp_path / "source"), str(place), "--to", form]
    assert main(argv) == 1 and f"{place} is in use by process 12 on node-7" in capsys.readouterr().err
    assert main([*argv, "--force"]) == 0 and not lock.exists()
    fastclip.create_model("ViT-tiny", pretrained=place)


def test_a_run_is_accepted_where_a_model_is(
    model: DualEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    model.save_pretrained(run / "model")
    (run / "metrics.jsonl").touch()
    assert main(["convert", str(run), str(tmp_path / "x.pt"), "--to", "open_clip"]) == 0
    again = fastclip.create_model("ViT-tiny", pretrained=tmp_path / "x.pt")
    assert all(torch.equal(x, again.state_dict()[key]) for key, x in model.state_dict().items())
    assert main(["convert", str(run), str(run / "model"), "--to", "fastclip"]) == 1
    assert "model is the source that the model is read from" in capsys.readouterr().err
    shutil.rmtree(run / "model")
    assert main(["convert", str(run), str(tmp_path / "y.pt"), "--to", "open_clip"]) == 1
    assert "has not ended and contains no model/" in capsys.readouterr().err


@pytest.mark.parametrize(("there", "form"), [("open_clip", "fastclip"), ("fastclip", "open_clip")])
def test_two_models_do_not_share_a_folder(there: str, form: str, model: DualEncoder, tmp_path: Path) -> None:
    convert(model, tmp_path, form=there)
    (tmp_path / "README.md").write_text("mine")
    before = states(tmp_path)
    with pytest.raises(ValueError, match=r"contains (open_clip_config|config)\.json of another model"):
        convert(model, tmp_path, form=form)
    assert states(tmp_path) == before
    convert(model, tmp_path, form=there)  # the same form may be overwritten, and other files stay
    assert states(tmp_path) == before


@pytest.mark.parametrize(
    ("target", "form", "message"),
    [
        ("x.pt", "huggingface", "huggingface is written as a folder, but"),
        ("x.safetensors", "fastclip", "fastclip is written as a folder, but"),
        (
            "file",
            "open_clip",
            "is a file, not a folder: choose a folder, or for open_clip a file name that ends in .pt or .safetensors",
        ),
        ("file", "fastclip", "is a file"),
    ],
)
def test_targets_that_do_not_do(
    target: str, form: str, message: str, model: DualEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save_pretrained(tmp_path / "source")
    (tmp_path / "file").write_text("mine")
    before = states(tmp_path)
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / target), "--to", form]) == 1
    assert message in capsys.readouterr().err
    assert states(tmp_path) == before


@pytest.mark.parametrize("form", ["fastclip", "open_clip", "huggingface"])
def test_an_old_configuration_beside_new_weights_is_told(
    form: str, model: DualEncoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A configuration older than its weights is reported. A process that is killed between the two renames leaves such
    a folder: the shapes agree, but options such as the activation may differ.
    """
    convert(model, tmp_path, form=form)
    with caplog.at_level(logging.WARNING):
        fastclip.create_model(pretrained=tmp_path)
        assert not caplog.text
        config = next(path for path in tmp_path.glob("*.json") if path.name in ("config.json", "open_clip_config.json"))
        config.write_text(config.read_text().replace("224", "225") + "\n")
        fastclip.create_model(pretrained=tmp_path)
    assert f"{config} was changed after" in caplog.text


def test_a_classifier_is_whole(model: DualEncoder, other: DualEncoder, tmp_path: Path) -> None:
    def classifier(of: DualEncoder, names: tuple[str, ...]) -> ImageClassifier:
        assert of.config is not None
        return ImageClassifier(of.visual, torch.randn(len(names), of.config.embed_dim), names)

    save_classifier(classifier(model, ("cat", "dog")), model, tmp_path / "x")
    before = states(tmp_path)
    with no_room(), pytest.raises(OSError, match=r"x/model\.safetensors"):
        save_classifier(classifier(other, ("cat", "dog", "cow")), other, tmp_path / "x")
    assert states(tmp_path) == before
    with pytest.raises(ValueError, match=r"contains head\.safetensors of another model"):
        other.save_pretrained(tmp_path / "x")  # the head of the other features would remain
    assert load_classifier(tmp_path / "x").class_names == ("cat", "dog")


def test_files_have_the_mode_of_the_umask(model: DualEncoder, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        for form in ("fastclip", "open_clip", "huggingface"):
            convert(model, tmp_path / form, form=form)
        convert(model, tmp_path / "x.pt", form="open_clip")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.rglob("*") if file.is_file()} == {0o640}


def test_what_a_killed_process_left_is_removed_an_hour_later(model: DualEncoder, tmp_path: Path) -> None:
    old, live = tmp_path / ".files.0a1b2c3d.tmp", tmp_path / ".files.4e5f6a7b.tmp"
    for folder in (old, live):
        folder.mkdir()
        (folder / "model.safetensors").touch()
    os.utime(old, (0, 0))
    model.save_pretrained(tmp_path)
    assert not old.exists() and live.exists()
