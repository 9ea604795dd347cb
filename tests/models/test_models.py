"""The encoders by name: sizes, initialisation, configurations, training options."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from support import needs

needs("models")

import open_clip
from timm.models.swin_transformer import PatchMerging, SwinTransformer, SwinTransformerBlock

import fastclip
from fastclip.models.config import FOLDER, ModelConfig, _warn_of_spelling, config_path, load_config
from fastclip.models.towers.coswin import ConvEmbed, ConvMerging

# Millions of parameters and embed_dim, from Radford et al. 2021 and from the other models' papers.
CLIP_SIZES = {
    "RN50": (102.01, 1024, 224),
    "RN101": (119.69, 512, 224),
    "RN50x4": (178.30, 640, 288),
    "RN50x16": (290.98, 768, 384),
    "RN50x64": (623.26, 1024, 448),
    "ViT-B-32": (151.28, 512, 224),
    "ViT-B-16": (149.62, 512, 224),
    "ViT-L-14": (427.62, 768, 224),
    "ViT-L-14-336": (427.94, 768, 336),
}
OTHERS = {  # millions, tolerance, embed_dim
    "align-efficientnet-l2-bert-large": (800, 0.01, 1376),
    "align-efficientnet-b7-bert-base": (171.5, 0.001, 640),
    "florence-coswin-h": (893, 0.03, 1024),
}
TINY = ("ViT-tiny", "RN-tiny", "align-tiny", "florence-tiny")


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def inputs(name: str, batch: int = 8) -> tuple[Tensor, Tensor]:
    images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven")
    return images, fastclip.get_tokenizer(name)([f"a photo of a handwritten {word}" for word in words[:batch]])


def test_list_is_complete() -> None:
    expected = {*CLIP_SIZES, *(f"{name}-quickgelu" for name in CLIP_SIZES), *OTHERS, *TINY, "florence-coswin-t"}
    assert set(fastclip.list_models()) == expected


@pytest.mark.parametrize("name", CLIP_SIZES)
def test_clip_has_open_clips_parameters(name: str) -> None:
    millions, embed_dim, image_size = CLIP_SIZES[name]
    for full in (name, f"{name}-quickgelu"):
        model = fastclip.create_model(full, device="meta")
        with torch.device("meta"):
            theirs = open_clip.create_model(full, device="meta")
        assert count(model) == count(theirs) == pytest.approx(millions * 1e6, abs=1e4)
        assert model.config is not None and model.config.embed_dim == embed_dim
        assert (
            model.config.vision_cfg.image_size
            == image_size
            == open_clip.get_model_config(full)["vision_cfg"]["image_size"]
        )
        assert model.config.quick_gelu == full.endswith("-quickgelu")
    plain, quick = (load_config(full).to_dict() for full in (name, f"{name}-quickgelu"))
    assert {**plain, "quick_gelu": True} == quick


@pytest.mark.parametrize("name", OTHERS)
def test_published_parameters(name: str) -> None:
    millions, tolerance, embed_dim = OTHERS[name]
    model = fastclip.create_model(name, device="meta")
    assert count(model) == pytest.approx(millions * 1e6, rel=tolerance)
    assert model.config is not None and model.config.embed_dim == embed_dim


def test_florence_towers_are_as_large_as_published() -> None:
    model = fastclip.create_model("florence-coswin-h", device="meta")
    assert count(model.visual) == pytest.approx(637e6, rel=0.03)
    assert count(model.text) == pytest.approx(256e6, rel=0.03)


def test_align_ends_at_the_last_block() -> None:
    model = fastclip.create_model("align-efficientnet-l2-bert-large", device="meta")
    assert model.encode_image(torch.empty(2, 3, 289, 289, device="meta")).shape == (2, 1376)
    assert not any("conv_head" in name or "classifier" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_are_small_and_learn(name: str) -> None:
    torch.manual_seed(0)
    model = fastclip.create_model(name)
    assert count(model) <= 3_000_000
    images, ids = inputs(name)
    assert ids.shape[1] == model.config.text_cfg.context_length  # type: ignore[union-attr]
    image_features, text_features, scale = model(images, ids)
    assert image_features.shape == text_features.shape == (8, model.config.embed_dim)  # type: ignore[union-attr]
    for features in (image_features, text_features):
        torch.testing.assert_close(features.norm(dim=1), torch.ones(8))
    assert scale.item() == pytest.approx(math.exp(model.logit_scale.item()))

    for module in model.modules():  # makes the function the same before and after the step
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = fastclip.contrastive_loss(*model(images, ids))
    before.backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    assert fastclip.contrastive_loss(*model(images, ids)).item() < before.item()


@pytest.mark.parametrize("name", TINY)
def test_checkpointed_gradients_are_the_same(name: str) -> None:
    torch.manual_seed(0)
    model = fastclip.create_model(name)
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    images, ids = inputs(name)
    kept = torch.zeros(2, 2)  # count of saved numbers: plain and checkpointed, image and text tower
    for i, m in enumerate((model, other)):
        torch.manual_seed(1)  # the same dropout in both models
        features = []
        for j, (encode, x) in enumerate(((m.encode_image, images), (m.encode_text, ids))):
            sizes: list[int] = []
            with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
                features.append(encode(x))
            kept[i, j] = sum(sizes)
        fastclip.contrastive_loss(*features, m.logit_scale.exp()).backward()
    assert float((kept[1] / kept[0]).max()) < 0.9, kept
    for (key, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("compiler", ["eager", pytest.param("aot_eager", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", TINY)
def test_compiles_without_breaks(name: str, compiler: str) -> None:
    torch.manual_seed(0)
    model = fastclip.create_model(name).eval()
    images, ids = inputs(name)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for found, expected in zip(compiled(images, ids), model(images, ids), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_locked_tower_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = fastclip.create_model("RN-tiny")
    model.lock_image_tower()
    model.train()
    assert not model.visual.training and model.text.training
    before = copy.deepcopy(model.visual.state_dict())
    images, ids = inputs("RN-tiny")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    fastclip.contrastive_loss(*model(images, ids)).backward()
    optimizer.step()
    assert all(torch.equal(x, before[key]) for key, x in model.visual.state_dict().items())
    assert all(p.grad is not None for p in model.text.parameters())
    model = fastclip.create_model("ViT-tiny")
    model.lock_text_tower()
    fastclip.contrastive_loss(*model(images, ids)).backward()
    assert all(p.grad is None for p in model.text.parameters())
    assert all(p.grad is not None for p in model.visual.parameters())


def test_sigmoid_models_carry_a_bias() -> None:
    torch.manual_seed(0)
    model = fastclip.create_model("ViT-tiny", init_logit_scale=math.log(10), init_logit_bias=-10.0)
    images, ids = inputs("ViT-tiny")
    output = model(images, ids)
    assert len(output) == 4 and output[2].item() == pytest.approx(10) and output[3].item() == -10
    fastclip.sigmoid_loss(*output).backward()
    assert model.logit_bias is not None and model.logit_bias.grad is not None
    plain = fastclip.create_model("ViT-tiny")
    assert plain.logit_bias is None and "logit_bias" not in plain.state_dict()


def test_loss_settings_come_with_the_configuration() -> None:
    for name in fastclip.list_models():
        config = load_config(name)
        family = "align" if name.startswith("align") else "unicl" if name.startswith("florence") else "clip"
        assert config.train_cfg.loss == family
        if family == "align":
            assert (config.train_cfg.label_smoothing, config.train_cfg.optimizer) == (0.1, "lamb")
            assert math.exp(config.init_logit_scale) == 1.0
        else:
            assert math.exp(config.init_logit_scale) == pytest.approx(1 / 0.07)


def test_clip_weights_start_as_published() -> None:
    """CLIP's weights start as in OpenAI's code: normal with a deviation of width ** -0.5 outside the blocks, torch's
    defaults inside, and ResNet blocks as the identity.
    """
    torch.manual_seed(0)
    vit = fastclip.create_model("ViT-B-32").visual
    for tensor in (vit.cls_token, vit.pos_embed, vit.head.weight):
        assert float(tensor.detach().std()) == pytest.approx(768**-0.5, rel=0.08)
    bound = math.sqrt(6 / (768 + 3 * 768))  # Xavier
    assert float(vit.blocks[5].attn.qkv.weight.detach().abs().max()) == pytest.approx(bound, rel=1e-3)
    for linear in (vit.blocks[5].mlp.fc1, vit.blocks[5].mlp.fc2, vit.blocks[5].attn.proj):
        assert float(linear.weight.abs().max()) == pytest.approx(linear.in_features**-0.5, rel=1e-3)
    resnet = fastclip.create_model("RN50").visual
    assert all(float(block.conv3_1x1.bn.weight.abs().max()) == 0 for stage in resnet.stages for block in stage)
    assert float(resnet.head.q.weight.std()) == pytest.approx(2048**-0.5, rel=0.02)
    assert float(resnet.head.pos_embed.std()) == pytest.approx(2048**-0.5, rel=0.02)
    conv = resnet.stages[2][1].conv2_kxk.conv
    assert float(conv.weight.abs().max()) == pytest.approx((9 * 256) ** -0.5, rel=1e-3)


def test_florence_and_align_weights_start_as_published() -> None:
    torch.manual_seed(0)
    tower = fastclip.create_model("florence-coswin-t").visual
    for weight in (tower.patch_embed.proj.weight, tower.layers[2].downsample.conv.weight):
        assert float(weight.std()) == pytest.approx(0.02, rel=0.03)
    assert float(tower.layers[2].blocks[1].mlp.fc1.weight.std()) == pytest.approx(0.02, rel=0.03)
    text = fastclip.create_model("align-tiny").text
    assert float(text.proj.weight.std()) == pytest.approx(0.02, rel=0.05)
    assert float(text.bert.encoder.layer[1].intermediate.dense.weight.std()) == pytest.approx(0.02, rel=0.05)


def test_coswin_is_swin_with_convolutions_around_its_blocks() -> None:
    torch.manual_seed(0)
    ours = fastclip.create_model("florence-coswin-t").visual.eval()
    plain = SwinTransformer(num_classes=0).eval()
    assert isinstance(ours.patch_embed, ConvEmbed) and ours.patch_embed.proj.kernel_size == (7, 7)
    assert plain.patch_embed.proj.kernel_size == (4, 4)
    merging = [stage.downsample for stage in ours.layers[1:]]
    assert all(isinstance(m, ConvMerging) and m.conv.kernel_size == (3, 3) for m in merging) and len(merging) == 3
    assert all(isinstance(stage.downsample, PatchMerging) for stage in plain.layers[1:])

    # All other parameters are Swin's, and the blocks compute the same from them
    def own(name: str) -> bool:
        return "patch_embed.proj" in name or "downsample" in name or "head" in name

    mine = {name: x for name, x in ours.state_dict().items() if not own(name)}
    theirs = {name: x for name, x in plain.state_dict().items() if not own(name)}
    assert {name: x.shape for name, x in mine.items()} == {name: x.shape for name, x in theirs.items()}
    plain.load_state_dict(mine, strict=False)
    blocks = [
        (a, b) for s, t in zip(ours.layers, plain.layers, strict=True) for a, b in zip(s.blocks, t.blocks, strict=True)
    ]
    assert len(blocks) == 12
    for a, b in blocks:
        assert type(a) is type(b) is SwinTransformerBlock
        x = torch.randn(1, *a.input_resolution, a.dim)
        assert torch.equal(a(x), b(x))


def test_coswin_windows_overlap() -> None:
    """The convolutions of CoSwin reach into the neighbours of a patch, unlike Swin's separate patches."""
    tower = fastclip.create_model("florence-tiny").visual.eval()
    image = torch.randn(1, 3, 32, 32, requires_grad=True)
    reached = torch.autograd.grad(tower.patch_embed.proj(image)[0, :, 3, 3].abs().sum(), image)[0][0].abs().sum(dim=0)
    rows = reached.sum(dim=1).nonzero()[:, 0].tolist()
    assert rows == list(range(10, 17))  # 7 rows, at a stride of 4
    merge = tower.layers[1].downsample
    x = torch.randn(1, 8, 8, 32, requires_grad=True)
    reached = torch.autograd.grad(merge.conv(x.permute(0, 3, 1, 2))[0, :, 2, 2].abs().sum(), x)[0][0].abs().sum(dim=2)
    assert reached.sum(dim=1).nonzero()[:, 0].tolist() == [3, 4, 5]
    assert merge(torch.randn(2, 5, 7, 32)).shape == (2, 3, 4, 64)  # odd sides are handled as in Swin


def test_configuration_of_ones_own(tmp_path: Path) -> None:
    values = json.loads((FOLDER / "ViT-tiny.json").read_text())
    values["vision_cfg"]["width"] = 64
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    model = fastclip.create_model(str(path))
    assert model.visual.embed_dim == 64
    assert fastclip.get_tokenizer(str(path))("a").shape == (1, 77)
    assert fastclip.load_image_transform(str(path))
    # A configuration file of open_clip
    theirs = Path(open_clip.__file__).parent / "model_configs" / "RN50.json"
    assert count(fastclip.create_model(str(theirs), device="meta")) == count(
        fastclip.create_model("RN50", device="meta")
    )


@pytest.mark.parametrize("name", fastclip.list_models())
def test_configuration_survives_writing(name: str) -> None:
    config = load_config(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())), where=name) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(emb_dim=3), r"config.json: unknown keys: emb_dim; known keys: .*embed_dim"),
        (lambda c: c.pop("embed_dim"), r"config.json: embed_dim must be given"),
        (lambda c: c["vision_cfg"].update(width="wide"), r"vision_cfg: width must be int, got 'wide'"),
        (lambda c: c["vision_cfg"].update(width=True), r"vision_cfg: width must be int, got True"),
        (lambda c: c["vision_cfg"].update(tower="vgg"), r"tower must be one of .*'coswin'.* got 'vgg'"),
        (lambda c: c["vision_cfg"].pop("patch_size"), r"vision_cfg: patch_size must be given"),
        (lambda c: c["vision_cfg"].update(image_size=33), r"image_size must be a multiple of patch_size 8, got 33"),
        (lambda c: c["vision_cfg"].update(head_width=48), r"multiple of head_width, got 128 and 48"),
        (lambda c: c["text_cfg"].update(heads=5), r"width=32 and heads=5"),
        (lambda c: c.update(text_cfg=3), r"text_cfg must be an object"),
        (lambda c: c.update(preprocess_cfg={"mean": ["a"]}), r"mean must be a list of float"),
    ],
)
def test_configuration_that_does_not_fit(tmp_path: Path, change: object, message: str) -> None:
    values = json.loads((FOLDER / "ViT-tiny.json").read_text())
    change(values)  # type: ignore[operator]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        fastclip.create_model(str(path))


def test_names_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model is called 'ViT-B-23': did you mean .*'ViT-B-32'"):
        fastclip.create_model("ViT-B-23")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json does not exist"):
        fastclip.create_model("nowhere.json")
    with pytest.raises(ValueError, match="needs the name of a model or pretrained="):
        fastclip.create_model()
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json is not JSON"):
        fastclip.create_model(str(tmp_path / "x.json"))


def test_openais_spelling_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    _warn_of_spelling.cache_clear()
    for _ in range(2):
        assert config_path("ViT-B/32").stem == "ViT-B-32"
    assert caplog.text.count("model 'ViT-B/32' is interpreted as ViT-B-32, whose activation is GELU; an OpenAI") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit-b-32", "did you mean 'ViT-B-32'?"),
        ("ViT_B_32", "did you mean 'ViT-B-32'?"),
        ("VIT-B/32", "did you mean 'ViT-B-32'?"),
        ("ViT-L/14@336px", "did you mean 'ViT-L-14-336'"),
        ("hf-hub:laion/CLIP-ViT-B-32", "download it from the Hugging Face Hub with `hf download`"),
        ("local-dir:runs/b32", "pass the folder runs/b32 as the checkpoint, not as the name of a model"),
        ("openai/clip-vit-base-patch32", "download it from the Hugging Face Hub with `hf download`"),
        ("../configs/ViT-B-32", "no model is called"),
        ("a\0b", "no model is called"),
        ("", "no model is called"),
    ],
)
def test_no_other_spelling_is_guessed(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        fastclip.create_model(name)


def test_a_name_is_no_folder_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ViT-tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert fastclip.create_model("ViT-tiny") and fastclip.get_tokenizer("ViT-tiny")
    with pytest.raises(FileNotFoundError, match="openai does not exist: pass the path of a file or folder"):
        fastclip.create_model("ViT-tiny", pretrained="openai")


def test_import_loads_no_encoder_library() -> None:
    code = (
        "import sys, fastclip; fastclip.backends(); "
        "found = {'timm', 'transformers', 'torchvision', 'open_clip', 'huggingface_hub'} & set(sys.modules); "
        "sys.exit(f'imported {found}' if found else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_missing_library_is_named() -> None:
    code = "import sys; sys.modules['timm'] = None; import fastclip; fastclip.create_model('ViT-tiny')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert re.search(r"fastclip\.create_model needs timm.*pip install '\.\[models\]'", done.stderr), done.stderr
    assert not hasattr(fastclip, "no_such_name")
