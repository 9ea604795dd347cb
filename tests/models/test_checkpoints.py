"""Checkpoints of other libraries, read and written: the features agree with theirs to 1e-5."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support import needs
from support.weights import relative_error, scatter

needs("models")

import open_clip
import transformers
from open_clip.model import resize_pos_embed, resize_text_pos_embed
from safetensors.torch import load_file, save_file

import fastclip
from fastclip.cli import main
from fastclip.models import DualEncoder
from fastclip.models.checkpoints.parameter_names import map_names, to_form

BUDGET = 1e-5  # DESIGN: outputs equal the originals on the same weights
TINY_CLIP = {
    "text_config": {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 20,
        "vocab_size": 100,
        "eos_token_id": 99,
    },
    "vision_config": {
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 32,
        "patch_size": 8,
    },
    "projection_dim": 48,
}


def texts(count: int = 3, length: int = 77, end: int = 49407) -> Tensor:
    ids = torch.randint(1, end - 1, (count, length), generator=torch.Generator().manual_seed(3))
    for row, text in enumerate(ids):
        text[4 + 5 * row], text[5 + 5 * row :] = end, 0
    return ids


def images(size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def assert_same_features(ours: Any, theirs: Any, *, size: int = 224, length: int = 77, end: int = 49407) -> None:
    x, ids = images(size), texts(length=length, end=end)
    assert relative_error(ours.eval().encode_image(x), theirs.eval().encode_image(x)) < BUDGET
    assert relative_error(ours.encode_text(ids), theirs.encode_text(ids)) < BUDGET
    assert ours.logit_scale.item() == pytest.approx(theirs.logit_scale.item(), rel=1e-6)


class AsOpenClip:
    """A model of transformers behind open_clip's methods."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.align = model.config.model_type == "align"
        self.logit_scale = -model.temperature.log() if self.align else model.logit_scale

    def eval(self) -> AsOpenClip:
        return self

    def encode_image(self, x: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=x).pooler_output

    def encode_text(self, ids: Tensor) -> Tensor:
        mask = (ids != 0).long() if self.align else torch.ones_like(ids)  # CLIP's attention is causal and needs no mask
        return self.model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output


# A ResNet, and a ViT with each activation. The next test covers models small enough for CPUs, which open_clip builds
# from fastclip's files.
OPEN_CLIP = [*(pytest.param(name, marks=pytest.mark.full) for name in ("RN50", "ViT-B-32")), "ViT-B-16-quickgelu"]


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip_both_ways(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = scatter(open_clip.create_model(name))
    with torch.no_grad():
        theirs.logit_scale.fill_(3.21)
    torch.save({"epoch": 3, "name": "x", "state_dict": theirs.state_dict()}, tmp_path / "theirs.pt")
    ours = fastclip.create_model(name, pretrained=tmp_path / "theirs.pt")
    assert_same_features(ours, theirs)

    ours.save_pretrained(tmp_path / "ours")
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "back.safetensors"), "--to", "open_clip"]) == 0
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[key], x) for key, x in theirs.state_dict().items())
    assert_same_features(ours, open_clip.create_model(name, pretrained=str(tmp_path / "back.safetensors")))


@pytest.mark.parametrize("name", ["ViT-tiny", "RN-tiny", "RN-tiny with two blocks a stage"])
@pytest.mark.parametrize("target", ["x.pt", "x.safetensors", "folder"])
def test_open_clip_forms(name: str, target: str, tmp_path: Path) -> None:
    if name.endswith("two blocks a stage"):
        values = fastclip.create_model("RN-tiny", device="meta").config.to_dict()
        values["vision_cfg"]["layers"] = [2, 2, 2, 2]
        name = str(tmp_path / "two.json")
        Path(name).write_text(json.dumps(values))
    torch.manual_seed(0)
    ours = fastclip.create_model(name)
    scatter(ours).save_pretrained(tmp_path / "ours")  # type: ignore[operator]
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "hub"), "--to", "open_clip"]) == 0
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'hub'}")
    assert_same_features(ours, theirs, size=32)
    # Each form is also read back
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / target), "--to", "open_clip"]) == 0
    again = fastclip.create_model(None if target == "folder" else name, pretrained=tmp_path / target)
    assert all(torch.equal(x, again.state_dict()[key]) for key, x in ours.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("inside", [None, "state_dict", "model"])
def test_wrapped_state_dicts(prefix: str, inside: str | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = fastclip.create_model("ViT-tiny")
    state = {prefix + key: x for key, x in model.state_dict().items()}
    torch.save(state if inside is None else {"epoch": 1, inside: state}, tmp_path / "x.pt")
    again = fastclip.create_model("ViT-tiny", pretrained=tmp_path / "x.pt")
    assert all(torch.equal(x, again.state_dict()[key]) for key, x in model.state_dict().items())


def openai_state() -> tuple[DualEncoder, dict[str, Tensor]]:
    """Return a model and its weights as OpenAI stores them: half precision, with three numbers as
    additional entries.
    """
    torch.manual_seed(0)
    theirs = scatter(fastclip.create_model("ViT-tiny"))
    assert isinstance(theirs, DualEncoder) and theirs.config is not None
    state = to_form(theirs.state_dict(), map_names(theirs.state_dict(), theirs.config, "open_clip"))
    facts = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}
    return theirs, {**{key: x.half() for key, x in state.items()}, **{k: torch.tensor(v) for k, v in facts.items()}}


class Holder(nn.Module):
    """Modules nested along the names of a state dict, so that TorchScript stores its tensors under these names."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        children: dict[str, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            head, _, rest = name.partition(".")
            if rest:
                children.setdefault(head, {})[rest] = tensor
            elif name in ("input_resolution", "context_length", "vocab_size"):
                self.register_buffer(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor))
        for name, part in children.items():
            self.add_module(name, Holder(part))

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("archive", [False, True])
def test_openai_means_quick_gelu(archive: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs, state = openai_state()
    path = tmp_path / "ViT.pt"
    if archive:
        torch.jit.save(torch.jit.script(Holder(state)), str(path))
    else:
        torch.save(state, path)
    with caplog.at_level(logging.WARNING):
        ours = fastclip.create_model("ViT-tiny", pretrained=path)
    assert "is an OpenAI checkpoint, so ViT-tiny is created with QuickGELU" in caplog.text
    assert ours.config is not None and ours.config.quick_gelu
    assert ours.visual.blocks[0].mlp.act.__class__.__name__ == "QuickGELU"
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    for key, x in ours.state_dict().items():
        torch.testing.assert_close(x, theirs.state_dict()[key].half().float())
    # the activations differ
    assert (ours.encode_image(images(32)) - theirs.encode_image(images(32))).abs().max() > 1e-4
    values = json.loads((Path(fastclip.__file__).parent / "models/configs/ViT-tiny.json").read_text())
    (tmp_path / "quick.json").write_text(json.dumps({**values, "quick_gelu": True}))
    caplog.clear()
    named = fastclip.create_model(str(tmp_path / "quick.json"), pretrained=path)
    assert not caplog.text and torch.equal(named.encode_image(images(32)), ours.encode_image(images(32)))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("safe", [True, False])
def test_hugging_face_clip_both_ways(activation: str, safe: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.CLIPConfig(**TINY_CLIP)
    config.text_config.hidden_act = config.vision_config.hidden_act = activation
    theirs = scatter(transformers.CLIPModel(config))
    theirs.save_pretrained(tmp_path / "theirs")  # type: ignore[operator]
    if not safe:
        (tmp_path / "theirs" / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), tmp_path / "theirs" / "pytorch_model.bin")
    ours = fastclip.create_model(pretrained=tmp_path / "theirs")
    assert_same_features(ours, AsOpenClip(theirs), size=32, length=20, end=99)
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "back"), "--to", "huggingface"]) == 0
    back, report = transformers.CLIPModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_features(ours, AsOpenClip(back), size=32, length=20, end=99)
    assert all(torch.equal(x, back.state_dict()[key]) for key, x in theirs.state_dict().items())
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "back")
    assert (processor.crop_size["height"], processor.size["shortest_edge"]) == (32, 32)


def test_hugging_face_clip_in_shards(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = scatter(transformers.CLIPModel(transformers.CLIPConfig(**TINY_CLIP)))
    theirs.save_pretrained(tmp_path, max_shard_size="300KB")  # type: ignore[operator]
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_features(fastclip.create_model(pretrained=tmp_path), AsOpenClip(theirs), size=32, length=20, end=99)
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match=r"names the shard model-0000.*which does not exist"):
        fastclip.create_model(pretrained=tmp_path)


def test_hugging_face_activation_must_be_the_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = fastclip.create_model("ViT-tiny")
    model.save_pretrained(tmp_path / "ours")
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "hf"), "--to", "huggingface"]) == 0
    assert fastclip.create_model("ViT-tiny", pretrained=tmp_path / "hf")
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    values["text_config"]["hidden_act"] = values["vision_config"]["hidden_act"] = "quick_gelu"
    (tmp_path / "hf" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"trained with QuickGELU, but ViT-tiny uses GELU: append -quickgelu to the"):
        fastclip.create_model("ViT-tiny", pretrained=tmp_path / "hf")
    values["text_config"]["hidden_act"] = "relu"
    (tmp_path / "hf" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="hidden_act must be gelu or quick_gelu, equal in both towers"):
        fastclip.create_model(pretrained=tmp_path / "hf")


@pytest.mark.parametrize("padding", [[], [3, 5]])
def test_hugging_face_align_both_ways(padding: list[int], tmp_path: Path) -> None:
    """ALIGN converts both ways. EfficientNet-B0 stands in for B7: the code is the same and takes a tenth of
    the time.
    """
    torch.manual_seed(0)
    small = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "depthwise_padding": padding}
    config = transformers.AlignConfig(text_config=small, vision_config=vision, projection_dim=320)
    theirs = scatter(transformers.AlignModel(config))
    with torch.no_grad():
        theirs.temperature.fill_(0.07)
    theirs.save_pretrained(tmp_path / "theirs")  # type: ignore[operator]
    ours = fastclip.create_model(pretrained=tmp_path / "theirs")
    for size in (289, 64, 97):  # transformers pads on the right and below, even if the stem's input has odd sides
        assert_same_features(ours, AsOpenClip(theirs), size=size, length=20, end=3000)
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "back"), "--to", "huggingface"]) == 0
    back, report = transformers.AlignModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_features(ours, AsOpenClip(back), size=97, length=20, end=3000)


def test_align_padding_of_texts_is_masked(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = fastclip.create_model("align-tiny").eval()
    tokenize = fastclip.get_tokenizer("align-tiny")
    long, short = (
        tokenize("a small grey scan"),
        fastclip.get_tokenizer("align-tiny", context_length=12)("a small grey scan"),
    )
    assert long.shape == (1, 64) and short.shape == (1, 12)
    torch.testing.assert_close(model.encode_text(long), model.encode_text(short))


def test_align_b7_has_hugging_faces_parameters() -> None:
    model = fastclip.create_model("align-efficientnet-b7-bert-base", device="meta")
    with torch.device("meta"):
        theirs = transformers.AlignModel(transformers.AlignConfig())
    mapped = map_names(model.state_dict(), model.config, "huggingface")  # type: ignore[arg-type]
    shapes = {name: x.shape for name, x in theirs.state_dict().items() if "text_model.pooler" not in name}
    assert {m.theirs[0]: model.state_dict()[m.ours].shape for m in mapped} == shapes


@pytest.mark.parametrize("name", ["ViT-tiny", "RN-tiny", "align-tiny", "florence-tiny"])
def test_own_form(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = scatter(fastclip.create_model(name, init_logit_bias=-7.0))
    assert isinstance(model, DualEncoder)
    model.save_pretrained(tmp_path / "x")
    for again in (
        fastclip.create_model(pretrained=tmp_path / "x"),
        fastclip.create_model(str(tmp_path / "x")),
        DualEncoder.from_pretrained(tmp_path / "x"),
        fastclip.create_model(name, pretrained=tmp_path / "x" / "model.safetensors"),
    ):
        assert again.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(x, model.state_dict()[key]) for key, x in again.state_dict().items())
        assert again.logit_bias is not None and again.logit_bias.item() == -7
    ids = fastclip.get_tokenizer(name)("a photo")
    assert torch.equal(fastclip.get_tokenizer(str(tmp_path / "x"))("a photo"), ids)
    assert fastclip.load_image_transform(str(tmp_path / "x"))
    again.save_pretrained(tmp_path / "x")  # over its source
    assert torch.equal(fastclip.get_tokenizer(str(tmp_path / "x"))("a photo"), ids)


def test_push_and_pull(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    import huggingface_hub

    class Hub:
        def __init__(self, token: str | None = None) -> None: ...

        def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> None:
            assert (repo_id, private, exist_ok) == ("me/model", True, True)

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> str:
            shutil.copytree(folder_path, tmp_path / "hub")
            return f"https://hub/{repo_id}"

    def download(repo_id: str, allow_patterns: list[str], **options: Any) -> str:
        assert repo_id == "me/model" and "*.safetensors" in allow_patterns and "*.bin" not in allow_patterns
        assert options == {"revision": "v1", "token": "t", "cache_dir": tmp_path, "local_files_only": True}
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    torch.manual_seed(0)
    model = fastclip.create_model("align-tiny")
    assert model.push_to_hub("me/model", private=True) == "https://hub/me/model"
    again = DualEncoder.from_pretrained("me/model", revision="v1", token="t", cache_dir=tmp_path, local_files_only=True)
    assert all(torch.equal(x, again.state_dict()[key]) for key, x in model.state_dict().items())


def test_other_resolutions_interpolate_as_open_clip(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    for name in ("ViT-tiny", "RN-tiny"):
        model = scatter(fastclip.create_model(name))
        assert isinstance(model, DualEncoder)
        model.save_pretrained(tmp_path / name)
        assert main(["convert", str(tmp_path / name), str(tmp_path / "x.pt"), "--to", "open_clip"]) == 0
        caplog.clear()
        larger = fastclip.create_model(name, pretrained=tmp_path / "x.pt", image_size=64, context_length=40)
        assert "interpolated from" in caplog.text and "text.positional_embedding" in caplog.text
        assert larger.encode_image(images(64)).shape == (2, 64)
        state = torch.load(tmp_path / "x.pt", weights_only=True)
        if name == "ViT-tiny":
            values = json.loads((Path(fastclip.__file__).parent / f"models/configs/{name}.json").read_text())
            vision = {key: x for key, x in values["vision_cfg"].items() if key != "tower"}
            text = {key: x for key, x in values["text_cfg"].items() if key != "tower"}
            theirs = open_clip.CLIP(64, {**vision, "image_size": 64}, {**text, "context_length": 40})
            resize_pos_embed(state, theirs)
            resize_text_pos_embed(state, theirs)
            theirs.load_state_dict(state)
            assert_same_features(larger, theirs, size=64, length=40)
    model = scatter(fastclip.create_model("florence-tiny"))
    model.save_pretrained(tmp_path / "f")  # type: ignore[operator]
    caplog.clear()
    smaller = fastclip.create_model("florence-tiny", pretrained=tmp_path / "f", image_size=64)
    assert smaller.encode_image(images(64)).shape == (2, 64)


@pytest.mark.parametrize(
    ("name", "form", "message"),
    [
        ("RN-tiny", "huggingface", "huggingface does not support the image tower resnet with the text tower clip"),
        ("florence-tiny", "open_clip", "open_clip does not support the image tower coswin"),
        ("align-tiny", "open_clip", "open_clip does not support the image tower efficientnet with the text tower bert"),
        ("align-tiny", "huggingface", "uses TensorFlow's padding"),
    ],
)
def test_convert_says_what_a_form_has_not(
    name: str, form: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    fastclip.create_model(name).save_pretrained(tmp_path / "x")
    assert main(["convert", str(tmp_path / "x"), str(tmp_path / "y"), "--to", form]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "y").exists()


def test_convert_keeps_the_sigmoid_bias(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = fastclip.create_model("ViT-tiny", init_logit_scale=math.log(10), init_logit_bias=-10.0)
    model.save_pretrained(tmp_path / "x")
    assert main(["convert", str(tmp_path / "x"), str(tmp_path / "y"), "--to", "open_clip"]) == 0
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'y'}")
    assert theirs.logit_bias.item() == -10 and theirs.logit_scale.exp().item() == pytest.approx(10)
    save_file({key: x.contiguous() for key, x in theirs.state_dict().items()}, tmp_path / "z.safetensors")
    again = fastclip.create_model("ViT-tiny", pretrained=tmp_path / "z.safetensors")
    assert again.logit_bias is not None and again.logit_bias.item() == -10


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    assert capsys.readouterr().out.split() == fastclip.list_models()
    assert main(["convert", "nowhere.pt", "x", "--to", "open_clip", "--model", "ViT-tiny"]) == 1
    assert "fastclip convert: the checkpoint nowhere.pt does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0 and "convert" in capsys.readouterr().out
