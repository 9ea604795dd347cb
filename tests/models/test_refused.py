"""Checkpoints that do not fit, are damaged or hostile: the error names what is wrong, and no pickle runs."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from support import needs

needs("models")

import fastclip
from fastclip.cli import main


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
    with pytest.raises(ValueError, match="holds no configuration: name the model"):
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
        ValueError, match=r"more than tensors|no whole safetensors|damaged or no checkpoint|was not read"
    ):
        fastclip.create_model("ViT-tiny", pretrained=path)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Hostile(canary)))  # the canary sings: such bytes, unpickled
    assert canary.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or no checkpoint"),
        (b"<html>404</html>", "was not read|damaged"),
        (
            {"weights": torch.zeros(3)},
            "no image-text model of OpenAI, open_clip, Hugging Face or fastclip: it holds weights",
        ),
        ([1, 2], "holds no state dict but list"),
        ({"epoch": 3}, "it holds nothing"),
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
    with pytest.raises(FileNotFoundError, match=r"holds no weights; looked for model\.safetensors"):
        fastclip.create_model("ViT-tiny", pretrained=tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model_type 'bert' is none of 'fastclip', 'clip' and 'align'"):
        fastclip.create_model(pretrained=tmp_path)


def test_truncated_files_are_damaged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = fastclip.create_model("ViT-tiny")
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    for name in ("x.pt", "model.safetensors"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=f"{name}.*(damaged|no whole|not read)"):
            fastclip.create_model("ViT-tiny", pretrained=tmp_path / name)
