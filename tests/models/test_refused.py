"""Checkpoints that do not fit, are damaged or hostile: the error names the fault, and no pickle is executed."""

from __future__ import annotations

import copy
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support import needs

needs("models")

import transformers
from safetensors.torch import save_file

import fastclip
from fastclip.cli import main
from fastclip.models.checkpoints.parameter_names import map_names, to_form
from fastclip.models.checkpoints.reading import read_config
from fastclip.models.classifier import ImageClassifier, load_classifier, save_classifier
from fastclip.models.convert import convert
from fastclip.models.embedder import load_embedder
from fastclip.models.transforms import image_transform


def test_checkpoint_that_does_not_fit_names_the_parameters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = fastclip.create_model("ViT-tiny")
    model.save_pretrained(tmp_path / "ours")
    main(["convert", str(tmp_path / "ours"), str(tmp_path / "x.pt"), "--to", "open_clip"])
    state = torch.load(tmp_path / "x.pt", weights_only=True)
    del state["visual.proj"]
    state["visual.extra"] = torch.zeros(3)
    state["text_projection"] = torch.zeros(32, 65)
    state["logit_scale"] = torch.zeros(2)
    state["visual.class_embedding"] = torch.zeros(4)
    torch.save(state, tmp_path / "broken.pt")
    with pytest.raises(ValueError) as error:
        fastclip.create_model("ViT-tiny", pretrained=tmp_path / "broken.pt")
    for part in (
        "broken.pt does not fit ViT-tiny",
        "1 missing: visual.proj",
        "1 unexpected: visual.extra",
        "text_projection (32, 65) for (32, 64)",
        "logit_scale (2,) for ()",
        "visual.class_embedding (4,) for (1, 1, 128)",
    ):
        assert part in str(error.value), str(error.value)
    state = torch.load(tmp_path / "x.pt", weights_only=True)
    del state["visual.proj"]
    torch.save(state, tmp_path / "partial.pt")
    with pytest.raises(ValueError, match=r"partial\.pt does not fit ViT-tiny: 1 missing: visual\.proj$"):
        fastclip.create_model("ViT-tiny", pretrained=tmp_path / "partial.pt")
    with pytest.raises(ValueError, match=r"does not fit RN-tiny: \d+ missing: visual\.bn1\.weight.* and \d+ more"):
        fastclip.create_model("RN-tiny", pretrained=tmp_path / "x.pt")
    with pytest.raises(ValueError, match="contains no configuration: name the model"):
        fastclip.create_model(pretrained=tmp_path / "x.pt")


class Hostile:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("where", ["file", "legacy", "pickle", "folder", "safetensors"])
def test_no_pickle_runs(where: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    state = {"visual.conv1.weight": torch.zeros(3), "evil": Hostile(canary)}
    path = tmp_path / "model.pt"
    if where == "folder":
        path = tmp_path / "folder"
        path.mkdir()
        (path / "config.json").write_text(json.dumps({"model_type": "clip"}))
        torch.save(state, path / "pytorch_model.bin")
    elif where == "safetensors":
        path = tmp_path / "model.safetensors"
        path.write_bytes(pickle.dumps(state))
    elif where == "pickle":
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=where == "file")
    with pytest.raises(
        ValueError, match=r"more than tensors|not a complete safetensors|damaged or not a checkpoint|was not read"
    ):
        fastclip.create_model("ViT-tiny", pretrained=path)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Hostile(canary)))  # the payload works: such bytes run when they are unpickled
    assert canary.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or not a checkpoint"),
        (b"<html>404</html>", "was not read|damaged"),
        (
            {"weights": torch.zeros(3)},
            "does not contain an image-text model .* OpenAI, open_clip, Hugging Face or fastclip: it contains weights",
        ),
        ([1, 2], "must contain a state dict, got list"),
        ({"epoch": 3}, "contains no weights, only epoch"),
    ],
)
def test_files_that_are_no_checkpoints(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        fastclip.create_model("ViT-tiny", pretrained=path)


def test_paths_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt does not exist"):
        fastclip.create_model("ViT-tiny", pretrained=tmp_path / "nowhere.pt")
    with pytest.raises(FileNotFoundError, match=r"contains no weights \(looked for model\.safetensors"):
        fastclip.create_model("ViT-tiny", pretrained=tmp_path)
    (tmp_path / "run" / "model").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"run is a training run, whose weights are in .*/run/model"):
        fastclip.create_model("ViT-tiny", pretrained=tmp_path / "run")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model_type must be 'fastclip', 'clip' or 'align', got 'bert'"):
        fastclip.create_model(pretrained=tmp_path)


def test_truncated_files_are_damaged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = fastclip.create_model("ViT-tiny")
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    for name in ("x.pt", "model.safetensors"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=f"{name}.*(damaged|not a complete|not read)"):
            fastclip.create_model("ViT-tiny", pretrained=tmp_path / name)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Weights of ViT-tiny in open_clip's form."""
    torch.manual_seed(0)
    model = fastclip.create_model("ViT-tiny")
    assert model.config is not None
    return to_form(model.state_dict(), map_names(model.state_dict(), model.config, "open_clip"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: x.to(torch.float8_e4m3fn),
            r"text_projection is torch\.float8_e4m3fn, but weights must have one of the dtypes",
        ),
        (lambda x: x.to(torch.int8), r"text_projection is torch\.int8"),
        (lambda x: x.to(torch.complex64), r"text_projection is torch\.complex64"),
        (lambda x: x.fill_(float("nan")), "text_projection contains NaN or infinity"),
        (lambda x: x.index_fill_(0, torch.tensor([3]), float("inf")), "text_projection contains NaN or infinity"),
        (
            lambda x: x.to_sparse(),
            r"text_projection must be a dense tensor on the CPU, got one that is torch\.sparse_coo",
        ),
        (
            lambda x: x.to("meta"),
            r"text_projection must be a dense tensor on the CPU, got one that is without numbers \(meta\)",
        ),
        (
            lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
            "text_projection must be a dense tensor on the CPU, got one that is quantised",
        ),
        (lambda x: 3.0, "1 missing: text_projection"),
        (lambda x: x[0], r"text_projection \(64,\) for \(32, 64\)"),
        (lambda x: x[None], r"text_projection \(1, 32, 64\) for \(32, 64\)"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_of_another_kind_name_the_tensor(
    change: Callable[[Tensor], object], message: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "x.pt"
    torch.save(weights | {"text_projection": change(weights["text_projection"].clone())}, path)
    with pytest.raises(ValueError, match=rf"x\.pt.*{message}"):
        fastclip.create_model("ViT-tiny", pretrained=path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision_become_float32(
    dtype: torch.dtype, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save({name: tensor.to(dtype) for name, tensor in weights.items()}, tmp_path / "x.pt")
    model = fastclip.create_model("ViT-tiny", pretrained=tmp_path / "x.pt")
    found = model.text.text_projection
    assert found.dtype == torch.float32 and torch.equal(found, weights["text_projection"].to(dtype).float())


def test_what_is_read_of_several_is_told(
    weights: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"state_dict": weights, "ema_state_dict": weights, "optimizer": {"state": {}}}, tmp_path / "x.pth.tar")
    fastclip.create_model("ViT-tiny", pretrained=tmp_path / "x.pth.tar")
    assert "x.pth.tar also contains ema_state_dict; reading only state_dict" in caplog.text
    model = fastclip.create_model("ViT-tiny")
    model.save_pretrained(tmp_path / "folder")
    torch.save(weights, tmp_path / "folder" / "pytorch_model.bin")
    again = fastclip.create_model(pretrained=tmp_path / "folder")
    assert "contains weights in model.safetensors and pytorch_model.bin; reading model.safetensors" in caplog.text
    assert torch.equal(again.text.text_projection, model.text.text_projection)


def test_open_clips_weights_go_with_its_configuration(weights: dict[str, Tensor], tmp_path: Path) -> None:
    """Weights of open_clip are read with open_clip's configuration, in a folder that contains Hugging Face's model too,
    as the repositories of LAION do.
    """
    model = fastclip.create_model("ViT-tiny")
    convert(model, tmp_path / "x", form="open_clip")
    convert(fastclip.create_model("ViT-tiny"), tmp_path / "y", form="huggingface")
    for file in (tmp_path / "y").iterdir():
        file.rename(tmp_path / "x" / file.name)
    again = fastclip.create_model(pretrained=tmp_path / "x")
    assert torch.equal(again.text.text_projection, model.text.text_projection)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda w: {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}, "contains no weights, only state"),
        (lambda w: {("module." * (i % 2)) + k: x for i, (k, x) in enumerate(w.items())}, "does not fit ViT-tiny"),
        (
            lambda w: {f"base.{k}": x for k, x in w.items()},
            "not contain an image-text model .*: it contains base.logit_scale",
        ),
        (lambda w: w | {"visual.transformer.resblocks.0.attn.lora_A": torch.ones(2)}, "1 unexpected: .*lora_A"),
        (
            lambda w: w | {"text.token_embedding.weight": torch.ones(2)},
            "contains two text towers: token_embedding.weight",
        ),
    ],
)
def test_state_dicts_that_would_leave_something_out(
    state: Callable[[dict[str, Tensor]], object], message: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(state(weights), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"x\.pt.*{message}"):
        fastclip.create_model("ViT-tiny", pretrained=tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([1], "must hold an object"),
        ({"weight_map": [1]}, "weight_map must be an object"),
        ({"weight_map": {"a": 1}}, "weight_map must contain a file name for each tensor"),
        ({}, "weight_map must be an object"),
        (
            {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}},
            "b.safetensors contains logit_scale, which another",
        ),
    ],
)
def test_indices_of_shards(index: object, message: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"logit_scale": torch.ones(())}, tmp_path / f"{name}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message) as error:
        fastclip.create_model("ViT-tiny", pretrained=tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_zip_file_that_unpacks_to_more_is_refused(tmp_path: Path) -> None:
    torch.save({"visual.proj": torch.zeros(2**20)}, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as old,
        zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(ValueError, match=r"y\.pt .*its entries claim [\d,]+ bytes, but the file has"):
        fastclip.create_model("ViT-tiny", pretrained=tmp_path / "y.pt")


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside a JSON value."""
    yield place
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*place, key))


def put(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return new
    value = copy.copy(value)
    value[place[0]] = put(value[place[0]], place[1:], new)
    return value


@pytest.mark.fault(
    "A model's configuration contains JSON of the wrong type anywhere",
    "A ValueError names the file, the position and the expected type",
)
@pytest.mark.parametrize("form", ["fastclip", "open_clip", "huggingface", "align"])
def test_configurations_with_odd_values_are_read_or_refused(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if form == "align":
        transformers.AlignConfig(projection_dim=320).save_pretrained(tmp_path)
        sizes = {"size": {"height": 346, "width": 346}, "crop_size": {"height": 289, "width": 289}}
        values: Any = sizes | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "rescale_offset": True}
        (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    else:
        convert(fastclip.create_model("ViT-tiny"), tmp_path, form=form)
    refused = 0
    for file in tmp_path.glob("*.json"):
        whole = file.read_text()
        for place in places(json.loads(whole)):
            for odd in (None, -1, 2**70, "x", [[1]], {"a": 1}, float("nan")):
                file.write_text(json.dumps(put(json.loads(whole), place, odd)))
                try:
                    config = read_config(tmp_path)
                    assert config is None or image_transform(config)
                except ValueError as error:
                    assert str(tmp_path) in str(error) and "\n" not in str(error), (place, odd, error)
                    refused += 1
        for text in ("[" * 100_000, "", "{", "\ud800"):
            file.write_bytes(text.encode("utf-8", "surrogatepass"))
            with pytest.raises(ValueError, match=file.name):
                read_config(tmp_path)
        file.write_text(whole)
    assert refused > 50


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mode", "L", "mode must be RGB, got 'L'"),
        ("resize_mode", "longest", "resize_mode must be one of shortest, squash"),
    ],
)
def test_open_clips_pictures_of_another_kind_are_refused(key: str, value: Any, message: str, tmp_path: Path) -> None:
    convert(fastclip.create_model("ViT-tiny"), tmp_path, form="open_clip")
    file = tmp_path / "open_clip_config.json"
    values = json.loads(file.read_text())
    for size in (32, [32, 32], None, 48):  # open_clip replaces these sizes by that of the image tower
        usual = {**values["preprocess_cfg"], "size": size, "mode": "RGB", "fill_color": 0}
        file.write_text(json.dumps({**values, "preprocess_cfg": usual}))
        assert read_config(tmp_path) is not None
    file.write_text(json.dumps({**values, "preprocess_cfg": {**values["preprocess_cfg"], key: value}}))
    with pytest.raises(ValueError, match=rf"open_clip_config\.json: preprocess_cfg: {message}"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("classes.json", {"class_names": 3}, "class_names must be a list of names"),
        ("classes.json", [], "must hold an object"),
        ("classes.json", {"class_names": ["a"]}, r"the head's weight has the shape \(2, 64\)"),
        ("head.safetensors", {"wieght": torch.ones(2)}, "holds no tensor bias, weight; it holds wieght"),
        (
            "head.safetensors",
            {"weight": torch.ones(2, 64), "bias": torch.ones(3)},
            r"the head's bias has the shape \(3,\)",
        ),
        ("head.safetensors", {"weight": torch.ones(2, 64).int(), "bias": torch.ones(2)}, r"torch\.int32"),
    ],
)
def test_classifiers_that_do_not_fit(name: str, content: Any, message: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = fastclip.create_model("ViT-tiny")
    save_classifier(ImageClassifier(model.visual, torch.ones(2, 64), ("a", "b")), model, tmp_path)
    if name.endswith(".json"):
        (tmp_path / name).write_text(json.dumps(content))
    else:
        save_file(content, tmp_path / name)
    with pytest.raises(ValueError, match=message) as error:
        load_classifier(tmp_path)
    assert name in str(error.value) or "head" in str(error.value)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"options": 3}, "options must be an object"),
        ({"options": {"model": 3}}, "the option 'model' must be"),
        ([], "an object"),
    ],
)
def test_states_of_training_that_are_none(state: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=rf"state\.json.*{message}"):
        load_embedder(tmp_path)


@pytest.mark.parametrize("vocabulary", ["../vocab.txt", "/etc/passwd", "a/b/c", "a/../b"])
def test_a_configuration_names_no_file_elsewhere(vocabulary: str, tmp_path: Path) -> None:
    fastclip.create_model("align-tiny").save_pretrained(tmp_path / "x")
    path = tmp_path / "x" / "config.json"
    path.write_text(json.dumps(put(json.loads(path.read_text()), ("text_cfg", "vocabulary"), vocabulary)))
    with pytest.raises(ValueError, match=r"config\.json: text_cfg: vocabulary must be a file next to"):
        fastclip.get_tokenizer(str(tmp_path / "x"))


def test_a_vocabulary_of_the_working_directory_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fastclip.create_model("align-tiny").save_pretrained(tmp_path / "x")
    (tmp_path / "x" / "vocab.txt").rename(tmp_path / "vocab.txt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"x/vocab\.txt of x does not exist"):
        fastclip.get_tokenizer("x")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "fpga", "mtia", "hpu"])
def test_devices_that_are_not_there(device: str, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=f"the device .*{device}"):
        load_embedder(checkpoint, device=device)
