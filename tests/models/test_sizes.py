"""Image size and context length follow from the weights; options change them."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from support import needs
from support.weights import relative_error, scatter

needs("models")

import open_clip
import transformers

import fastclip
from fastclip.cli import main
from fastclip.models import DualEncoder
from fastclip.models.config import FOLDER, ModelConfig, load_config
from fastclip.models.convert import convert
from fastclip.models.dual_encoder import build_model
from fastclip.models.embedder import load_embedder

LENGTH, SIDE = 32, 48  # ViT-tiny.json has 77 and 32


def made(name: str = "ViT-tiny", *, length: int = LENGTH, side: int = SIDE) -> DualEncoder:
    torch.manual_seed(0)
    model = build_model(load_config(name).with_changes(context_length=length, image_size=side))
    scatter(model)
    return model


def open_clips() -> nn.Module:
    """Return ViT-tiny as open_clip builds it, with 32 tokens and 48 pixels."""
    values = json.loads((FOLDER / "ViT-tiny.json").read_text())
    vision = {key: x for key, x in values["vision_cfg"].items() if key != "tower"} | {"image_size": SIDE}
    text = {key: x for key, x in values["text_cfg"].items() if key != "tower"} | {"context_length": LENGTH}
    torch.manual_seed(0)
    return scatter(open_clip.CLIP(values["embed_dim"], vision, text))


@pytest.mark.fault(
    "A checkpoint's context length or image size differs from that of the given model name",
    "The sizes of the weights apply, for the tokenizer and the transform as well. The log reports this once",
)
def test_features_are_open_clips_whatever_the_name_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = open_clips()
    torch.save({"epoch": 1, "state_dict": theirs.state_dict()}, tmp_path / "theirs.pt")
    with caplog.at_level(logging.WARNING):
        ours = load_embedder(tmp_path / "theirs.pt", model="ViT-tiny")
    assert (
        caplog.text.count("theirs.pt has weights for context_length 32 in place of 77 and image_size 48 in place of 32")
        == 1
    )
    assert "interpolated" not in caplog.text
    assert ours.model.config is not None and ours.model.config.vision_cfg.image_size == SIDE
    texts = ["a photo of a cat", "words " * 60]
    wanted = open_clip.SimpleTokenizer(context_length=LENGTH)(texts)
    assert torch.equal(ours.tokenize(texts), wanted)
    x = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        assert relative_error(ours.embed_texts(texts), theirs.encode_text(wanted, normalize=True)) < 1e-5
        assert relative_error(ours.embed_images(x), theirs.encode_image(x, normalize=True)) < 1e-5
    from PIL import Image

    assert ours.transform(Image.new("RGB", (60, 70))).shape == (3, SIDE, SIDE)


@pytest.mark.parametrize("form", ["fastclip", "open_clip", "huggingface"])
@pytest.mark.parametrize("name", ["ViT-tiny", "RN-tiny"])
def test_sizes_are_found_in_every_form(form: str, name: str, tmp_path: Path) -> None:
    if (name, form) == ("RN-tiny", "huggingface"):
        pytest.skip("Hugging Face has no ResNets")
    side = 64 if name == "RN-tiny" else SIDE
    model = made(name, side=side)
    convert(model, tmp_path / "x", form=form)
    weights = next(tmp_path.glob("x/*.safetensors"))
    again = fastclip.create_model(name, pretrained=weights)
    assert again.config is not None
    assert (again.config.text_cfg.context_length, again.config.vision_cfg.image_size) == (LENGTH, side)
    assert all(torch.equal(x, again.state_dict()[key]) for key, x in model.state_dict().items())
    beside = fastclip.create_model(pretrained=tmp_path / "x")  # configured by the folder's own file
    assert beside.config is not None and beside.config.vision_cfg == again.config.vision_cfg


def test_a_configuration_beside_the_weights_is_contradicted_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["text_cfg"]["context_length"] = 77
    (tmp_path / "config.json").write_text(json.dumps(values))
    model = fastclip.create_model(pretrained=tmp_path)
    assert model.config is not None and model.config.text_cfg.context_length == LENGTH
    assert "weights for context_length 32 in place of 77; its configuration is changed accordingly" in caplog.text
    assert "config.json was changed after model.safetensors was written" in caplog.text


def test_other_sizes_are_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made().save_pretrained(tmp_path)
    model = fastclip.create_model("ViT-tiny", pretrained=tmp_path / "model.safetensors", image_size=64)
    assert model.config is not None
    assert (model.config.text_cfg.context_length, model.config.vision_cfg.image_size) == (LENGTH, 64)
    assert "visual.pos_embed interpolated from (1, 37, 128) to (1, 65, 128)" in caplog.text
    ours = load_embedder(tmp_path, context_length=20)
    assert ours.tokenize(["a"]).shape == (1, 20)
    assert "text.positional_embedding interpolated" in caplog.text


@pytest.mark.parametrize("size", [0, -32, 2_000_000, True, "32"])
@pytest.mark.parametrize("option", ["image_size", "context_length"])
def test_sizes_of_no_model_are_refused(option: str, size: Any) -> None:
    with pytest.raises(ValueError, match=option):
        fastclip.create_model("ViT-tiny", **{option: size})


def test_image_size_that_patches_do_not_fill() -> None:
    with pytest.raises(ValueError, match="ViT-tiny: image_size must be a multiple of patch_size 8, got 33"):
        fastclip.create_model("ViT-tiny", image_size=33)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"vocab_size": 600}, r"token_embedding\.weight \(600, 32\) for \(49408, 32\)"),
        ({"width": 64, "heads": 2}, r"positional_embedding \(32, 64\) for \(32, 32\)"),
    ],
)
def test_other_sizes_must_be_the_names(change: dict[str, int], told: str, tmp_path: Path) -> None:
    config = load_config("ViT-tiny").with_changes(context_length=LENGTH)
    torch.manual_seed(0)
    build_model(replace(config, text_cfg=replace(config.text_cfg, **change))).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"does not fit ViT-tiny: .*{told}"):
        fastclip.create_model("ViT-tiny", pretrained=tmp_path / "model.safetensors")


def test_another_patch_size_is_no_other_image_size(tmp_path: Path) -> None:
    config = load_config("ViT-tiny")
    torch.manual_seed(0)
    model = build_model(replace(config, vision_cfg=replace(config.vision_cfg, patch_size=16, image_size=64)))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"patch_embed\.proj\.weight \(128, 3, 16, 16\) for \(128, 3, 8, 8\)"):
        fastclip.create_model("ViT-tiny", pretrained=tmp_path / "model.safetensors")


def test_berts_positions_are_the_weights(tmp_path: Path) -> None:
    config = load_config("align-tiny")
    torch.manual_seed(0)
    short = replace(
        config, text_cfg=replace(config.text_cfg, max_positions=40, context_length=40), folder=config.folder
    )
    build_model(short).save_pretrained(tmp_path)
    model = fastclip.create_model("align-tiny", pretrained=tmp_path / "model.safetensors")
    assert model.config is not None and model.config.text_cfg.context_length == 40
    with pytest.raises(ValueError, match="context_length must be at most max_positions 40, got 64"):
        fastclip.create_model("align-tiny", pretrained=tmp_path / "model.safetensors", context_length=64)


def test_windows_of_another_size_are_asked_for(tmp_path: Path) -> None:
    """A window size that differs from the name's configuration is refused: CoSwin's tables determine the
    window, but not the image size.
    """
    values = load_config("florence-tiny").to_dict()
    values["vision_cfg"]["window_size"] = 2
    torch.manual_seed(0)
    build_model(ModelConfig.from_dict(values, where="x")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"of another shape: .*relative_position_bias_table"):
        fastclip.create_model("florence-tiny", pretrained=tmp_path / "model.safetensors")


def test_hugging_faces_sizes_rule(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path / "ours")
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "hf"), "--to", "huggingface"]) == 0
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "hf")
    model = fastclip.create_model("ViT-tiny", pretrained=tmp_path / "hf")
    assert model.config is not None and theirs.config.text_config.max_position_embeddings == LENGTH
    assert model.config.text_cfg.context_length == LENGTH


def test_training_goes_on_with_the_weights_sizes(tmp_path: Path) -> None:
    made(side=32).save_pretrained(tmp_path / "start")
    run = tmp_path / "run"
    argv = ["train", "--data", "digits", "--model", "ViT-tiny", "--output", str(run), "--max_steps", "1"]
    argv += ["--pretrained", str(tmp_path / "start" / "model.safetensors"), "--batch_size", "8", "--workers", "0"]
    assert main(argv) == 0
    for path in (run / "model", *run.glob("checkpoints/step-*")):
        ours = load_embedder(path)
        assert ours.tokenize(["a"]).shape == (1, LENGTH)
        assert ours.embed_texts(["a"]).isfinite().all()


@pytest.mark.parametrize("command", ["search", "serve", "filter", "embed", "report", "convert", "finetune", "eval"])
def test_commands_that_load_a_model_take_both_sizes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for task in ("zeroshot", "retrieval", "robustness", "compose", "probe") if command == "eval" else (None,):
        with pytest.raises(SystemExit):
            main([command, *([task] if task else []), "--help"])
        assert {"--image-size", "--context-length", "--model"} <= set(capsys.readouterr().out.split())


def test_convert_interpolates_where_it_is_asked_to(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path / "x")
    argv = ["convert", str(tmp_path / "x"), str(tmp_path / "y"), "--to", "open_clip"]
    assert main([*argv, "--image-size", "64", "--context-length", "20"]) == 0
    values = json.loads((tmp_path / "y" / "open_clip_config.json").read_text())["model_cfg"]
    assert (values["vision_cfg"]["image_size"], values["text_cfg"]["context_length"]) == (64, 20)


def test_what_lies_beside_the_weights_rules_over_the_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load_config("ViT-tiny")
    preprocess = replace(config.preprocess_cfg, mean=(0.4, 0.4, 0.4), resize_mode="squash")
    torch.manual_seed(0)
    convert(build_model(replace(config, preprocess_cfg=preprocess)), tmp_path / "x", form="open_clip")
    model = fastclip.create_model("ViT-tiny", pretrained=tmp_path / "x")
    assert model.config is not None and model.config.preprocess_cfg == preprocess
    said = "the preprocessing options mean (0.4, 0.4, 0.4), resize_mode squash, which replace those of ViT-tiny"
    assert said in caplog.text

    build_model(replace(config, text_cfg=replace(config.text_cfg, heads=4))).save_pretrained(tmp_path / "y")
    refused = "y has heads 4 in its text_cfg, but ViT-tiny has 2: name a model that fits"
    with pytest.raises(ValueError, match=refused):
        fastclip.create_model("ViT-tiny", pretrained=tmp_path / "y")
