"""Images and texts are processed as transformers would, by the processor files of a Hugging Face model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from support import needs

needs("train")

import transformers

import fastclip
from fastclip.models import DualEncoder
from fastclip.models.config import FOLDER
from fastclip.models.convert import convert
from fastclip.models.processor import _KINDS, _USUAL
from fastclip.models.tokenizers.vocabulary import words_of

VOCABULARY = FOLDER / "align-tiny.vocab.txt"
WORDS = VOCABULARY.read_text(encoding="utf-8").split()
OTHER = [*WORDS[:5], *reversed(WORDS[5:])]  # the same words with other ids
SQUARE = {"height": 32, "width": 32}
CLIP = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "crop_size": SQUARE}
# The values of kakaobrain/align-base, for smaller images
ALIGN: dict[str, Any] = {
    "image_processor_type": "EfficientNetImageProcessor",
    "size": {"height": 48, "width": 48},
    "crop_size": SQUARE,
    "do_center_crop": True,
    "do_normalize": False,
    "include_top": False,
    "resample": 2,
    "rescale_factor": 1 / 127.5,
    "rescale_offset": True,
}
TEXTS = ["a photo of a cat", "Zebra, 12 µm!", ""]


def processor_of(values: dict[str, Any]) -> Any:
    """Return transformers' image processor, which resizes with Pillow as fastclip does."""
    name = values["image_processor_type"]
    return getattr(transformers, f"{name}Pil", getattr(transformers, name)).from_dict(values)


def pixels(processor: Any, image: Image.Image) -> Tensor:
    return torch.as_tensor(np.asarray(processor(image, return_tensors="np")["pixel_values"][0]), dtype=torch.float32)


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8))


def clip_folder(folder: Path, values: dict[str, Any]) -> Path:
    tower = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = {**tower, "image_size": 32, "patch_size": 16}
    transformers.CLIPConfig(text_config=tower, vision_config=vision).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


def align_folder(folder: Path) -> Path:
    text = {"vocab_size": len(WORDS), "hidden_size": 64, "intermediate_size": 256}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    vision = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "depthwise_padding": [], "image_size": 32}
    transformers.AlignConfig(text_config=text, vision_config=vision, projection_dim=320).save_pretrained(folder)
    return folder


def with_weights(folder: Path) -> Path:
    transformers.AlignModel(transformers.AlignConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


def bert(words: list[str], **options: Any) -> Any:
    return transformers.BertTokenizer(vocab={word: number for number, word in enumerate(words)}, **options)


def clip_tokenizer() -> Any:
    return transformers.CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[])


def in_a_whole_processor(folder: Path) -> None:
    """Rewrite the image processor's file as `save_pretrained` of a CLIPProcessor or
    AlignProcessor does since transformers 5.
    """
    alone = folder / "preprocessor_config.json"
    whole = {"image_processor": json.loads(alone.read_text()), "processor_class": "CLIPProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(whole))
    alone.unlink()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        CLIP,
        {**CLIP, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "resample": 2},
        {**CLIP, "size": 32, "crop_size": 32, "feature_extractor_type": "CLIPFeatureExtractor"},
        {**CLIP, "size": {"shortest_edge": 40, "longest_edge": None}},
        {**CLIP, "size": {"height": 40, "width": 40}},
        {**CLIP, "size": 40, "default_to_square": True},
        {**CLIP, "size": [32, 32], "do_center_crop": False},
        {**CLIP, "do_normalize": False},
        {**CLIP, "rescale_factor": 1 / 127.5},
        {**CLIP, "do_rescale": False},
        {**CLIP, "do_rescale": False, "do_normalize": False},
        {**CLIP, "do_pad": None, "do_convert_rgb": True, "data_format": "channels_first", "processor_class": "x"},
        {**CLIP, "do_normalize": None},  # treated as false
        {**CLIP, "size": SQUARE, "do_center_crop": None, "crop_size": None},
        {**CLIP, "rescale_offset": True},  # used by EfficientNet alone
        {"image_processor_type": "SiglipImageProcessor", "size": SQUARE},
        {"image_processor_type": "ViTImageProcessor", "size": 32},
        ALIGN,
        {**ALIGN, "include_top": True},
        {key: value for key, value in ALIGN.items() if key != "include_top"},
        {**ALIGN, "do_normalize": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]},
        {**ALIGN, "do_normalize": True, "rescale_offset": False, "rescale_factor": 1 / 255, "include_top": None},
    ],
)
def test_pictures_are_transformers(values: dict[str, Any], nested: bool, tmp_path: Path) -> None:
    folder = clip_folder(tmp_path, values)
    if nested:
        in_a_whole_processor(folder)
    for image in (picture(), Image.new("RGB", (32, 32), "white")):
        wanted, found = pixels(processor_of(values), image), fastclip.load_image_transform(str(folder))(image)
        assert found.shape == wanted.shape == (3, 32, 32)
        assert float((found - wanted).abs().max()) < 2e-6 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize(
    "old",
    [
        # Files of openai/clip-vit-base-patch32, and those that transformers 4 wrote for its fast processors
        {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32, "resample": 3},
        {
            "image_processor_type": "CLIPImageProcessorFast",
            "crop_size": SQUARE,
            "size": {"shortest_edge": 32},
            **dict.fromkeys(("device", "do_pad", "input_data_format", "pad_size", "return_tensors")),
        },
        {"size": {"shortest_edge": 32}, "crop_size": 32},
    ],
)
def test_files_of_older_transformers(old: dict[str, Any], tmp_path: Path) -> None:
    folder = clip_folder(tmp_path, old)
    wanted = pixels(processor_of(CLIP), picture())
    assert float((fastclip.load_image_transform(str(folder))(picture()) - wanted).abs().max()) < 1e-5


@pytest.mark.parametrize("kind", sorted(_KINDS))
def test_defaults_are_transformers(kind: str) -> None:
    theirs = getattr(transformers, kind)()
    for name, value in (_USUAL | _KINDS[kind]).items():
        found = getattr(theirs, name)
        if name in ("size", "crop_size"):
            found = {edge: number for edge, number in dict(found).items() if number is not None}
        elif isinstance(value, list | bool):  # transformers stores tuples, and None for false
            found = type(value)(found or ())
        assert found == value, name


@pytest.mark.parametrize("kind", ["CLIPProcessor", "AlignProcessor"])
def test_a_whole_processor_goes_first(kind: str, tmp_path: Path) -> None:
    """The file of a whole processor takes precedence over that of the image processor, as in transformers,
    with the vocabulary beside them.
    """
    clip = kind == "CLIPProcessor"
    values = {**(CLIP if clip else ALIGN), "do_normalize": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5] * 3}
    name = values["image_processor_type"]
    if clip:
        folder = clip_folder(tmp_path, {**values, "image_mean": [0.9] * 3})
        transformers.CLIPProcessor(getattr(transformers, name).from_dict(values), clip_tokenizer()).save_pretrained(
            folder
        )
    else:
        folder = align_folder(tmp_path)
        (folder / "preprocessor_config.json").write_text(json.dumps({**values, "image_mean": [0.9] * 3}))
        transformers.AlignProcessor(getattr(transformers, name).from_dict(values), bert(OTHER)).save_pretrained(folder)
    assert (folder / "processor_config.json").is_file()
    image = Image.new("RGB", (48, 48), "white")
    theirs = pixels(getattr(transformers, name).from_pretrained(folder), image)
    assert float((theirs - pixels(processor_of(values), image)).abs().max()) < 1e-5
    assert float((fastclip.load_image_transform(str(folder))(image) - theirs).abs().max()) < 1e-5
    # The processor file of an older transformers contains no image processor and is ignored
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": kind}))
    theirs = pixels(getattr(transformers, name).from_pretrained(folder), image)
    assert float((fastclip.load_image_transform(str(folder))(image) - theirs).abs().max()) < 1e-5


@pytest.mark.fault(
    "A Hugging Face image processor has a step that fastclip's transforms do not implement",
    "A ValueError names the file, the key and what is supported",
)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "size",
            {"height": 32, "width": 40},
            'size must be a number, {"shortest_edge": N} or {"height": N, "width": N}, got',
        ),
        ("size", {"shortest_edge": 32, "longest_edge": 64}, 'size must be a number, {"shortest_edge": N} or'),
        ("size", {"longest_edge": 32}, 'size must be a number, {"shortest_edge": N} or'),
        ("size", [32.5], "size must contain positive whole numbers of pixels"),
        ("size", 16, r"crop_size 32 must be at most size, 16"),
        ("crop_size", {"height": 32, "width": 40}, 'crop_size must be a number or {"height": N, "width": N}'),
        ("crop_size", 24, "size and crop_size give images of 24 pixels, but the image tower .* takes image_size 32"),
        ("do_resize", False, "do_resize must be true"),
        ("do_center_crop", None, "do_center_crop must be true if size has shortest_edge"),
        ("do_pad", True, "do_pad must be false, as this step is not supported"),
        ("do_flip_channel_order", True, "do_flip_channel_order must be false"),
        ("resample", 6, "resample must be one of"),
        ("resample", [3], "resample must be one of"),
        ("rescale_factor", 0, "rescale_factor must be a positive number"),
        ("do_normalize", "yes", "do_normalize must be true or false"),
        ("image_std", [0.5, 0.5, 0], "image_std must be three positive numbers"),
        ("image_mean", 0.5, "image_mean must be three numbers"),
        ("image_processor_type", "ConvNextImageProcessor", "image_processor_type must be one of BitImageProcessor, "),
    ],
)
def test_what_is_not_done_to_pictures_is_refused(
    key: str, value: Any, message: str, nested: bool, tmp_path: Path
) -> None:
    folder = clip_folder(tmp_path, {**CLIP, key: value})
    if nested:
        in_a_whole_processor(folder)
    file = "/processor_config.json: image_processor" if nested else "/preprocessor_config.json"
    with pytest.raises(ValueError, match=f"{file}: {message}"):
        fastclip.load_image_transform(str(folder))


def their_ids(folder: Path) -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer(TEXTS, padding="max_length", truncation=True, max_length=64)["input_ids"]


def test_bert_vocabulary_is_transformers(tmp_path: Path) -> None:
    """BERT's vocabulary is read as transformers reads it: from tokenizer.json alone, from tokenizer.json despite a
    vocab.txt with other ids, and from converted models.
    """
    torch.manual_seed(0)
    folder = align_folder(tmp_path / "x")
    (folder / "preprocessor_config.json").write_text(json.dumps(ALIGN))
    with_weights(folder)
    bert(OTHER).save_pretrained(folder)
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    # the order follows from the ids, not from the file
    values["model"]["vocab"] = dict(sorted(values["model"]["vocab"].items()))
    file.write_text(json.dumps(values))
    assert not (folder / "vocab.txt").exists() and words_of(folder / "tokenizer.json") == OTHER
    wanted = their_ids(folder)
    assert wanted != fastclip.get_tokenizer("align-tiny")(TEXTS).tolist()
    assert fastclip.get_tokenizer(str(folder))(TEXTS).tolist() == wanted
    assert fastclip.get_tokenizer("align-tiny", vocabulary=folder / "tokenizer.json")(TEXTS).tolist() == wanted
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    assert their_ids(folder) == wanted == fastclip.get_tokenizer(str(folder))(TEXTS).tolist()
    model = fastclip.create_model(pretrained=folder)
    for form in ("fastclip", "huggingface"):
        for _ in range(2):  # also over its previous output
            convert(model, tmp_path / form, form=form)
        assert (tmp_path / form / "vocab.txt").read_text().split("\n") == [*OTHER, ""]
        assert fastclip.get_tokenizer(str(tmp_path / form))(TEXTS).tolist() == wanted
    assert their_ids(tmp_path / "huggingface") == wanted
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"the vocabulary .*tokenizer\.json of x does not exist"):
        fastclip.models.factory.tokenizer_of(model.config, "x")  # type: ignore[arg-type]


def change(**values: Any) -> Callable[[dict[str, Any]], None]:
    def made(tokenizer: dict[str, Any]) -> None:
        for name, value in values.items():
            part, _, key = name.partition("__")
            if key:
                tokenizer[part][key] = value
            else:
                tokenizer[part] = value

    return made


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (change(normalizer__lowercase=False), "normalizer: lowercase must be True, as in BERT's tokenizer, got False"),
        (change(normalizer__strip_accents=False), "normalizer: strip_accents must be true or null"),
        (change(normalizer=None), "normalizer: type must be 'BertNormalizer'"),
        (change(normalizer=[1]), "normalizer must be an object"),
        (change(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer: type must be 'BertPreTokenizer'"),
        (change(model__type="BPE"), "model: type must be 'WordPiece', as in BERT's tokenizer, got 'BPE'"),
        (change(model__continuing_subword_prefix="@@"), "model: continuing_subword_prefix must be '##'"),
        (change(model__vocab=None), "model: vocab must be an object"),
        (change(model__vocab={"[PAD]": 0, "a": 2}), "model: vocab must number its 2 words from 0 without gaps"),
        (change(model__vocab={"[PAD]": 0, "[UNK]": 1}), r"model: vocab has no \[CLS\]"),
        (
            change(model__vocab={word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a\nb"])}),
            r"model: vocab contains 'a\\nb', which cannot be a line of vocab\.txt",
        ),
        (change(added_tokens=[{"id": 5, "content": "new"}]), r"added_tokens may only be \[PAD\], "),
    ],
)
def test_tokenizers_of_other_kinds_are_refused(
    changed: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    folder = align_folder(tmp_path)
    bert(WORDS).save_pretrained(folder)
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    changed(values)
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"tokenizer\.json: {message}"):
        fastclip.get_tokenizer(str(folder))
    with pytest.raises(ValueError, match=rf"tokenizer\.json: {message}"):
        fastclip.get_tokenizer("align-tiny", vocabulary=file)


@pytest.mark.parametrize("key", ["do_lower_case", "tokenize_chinese_chars", "strip_accents"])
def test_options_of_another_tokenizer_are_refused(key: str, tmp_path: Path) -> None:
    """Options that would change the tokenizer are refused. A vocab.txt has no option for case, but
    transformers obeys tokenizer_config.json.
    """
    folder = align_folder(tmp_path)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    for value in (None, True):
        (folder / "tokenizer_config.json").write_text(json.dumps({key: value, "tokenizer_class": "BertTokenizer"}))
        assert fastclip.get_tokenizer(str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps({key: False}))
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: {key} must be True, as in BERT's tokenizer"):
        fastclip.get_tokenizer(str(folder))


@pytest.fixture(scope="module")
def align(tmp_path_factory: pytest.TempPathFactory) -> DualEncoder:
    torch.manual_seed(0)
    folder = with_weights(align_folder(tmp_path_factory.mktemp("align")))
    (folder / "preprocessor_config.json").write_text(json.dumps(ALIGN))
    bert(WORDS).save_pretrained(folder)
    return fastclip.create_model(pretrained=folder)


def test_pictures_and_texts_of_what_is_converted(align: DualEncoder, tmp_path: Path) -> None:
    convert(align, tmp_path, form="huggingface")
    image = picture()
    wanted = pixels(processor_of(ALIGN), image)
    kind = getattr(transformers, "EfficientNetImageProcessorPil", transformers.EfficientNetImageProcessor)
    assert float((pixels(kind.from_pretrained(tmp_path), image) - wanted).abs().max()) < 1e-5
    assert float((fastclip.load_image_transform(str(tmp_path))(image) - wanted).abs().max()) < 1e-5
    assert their_ids(tmp_path) == fastclip.get_tokenizer("align-tiny")(TEXTS).tolist()


@pytest.mark.fault(
    "The target of `fastclip convert --to huggingface` contains files that transformers would read before the new ones",
    "A ValueError names the file, and nothing is written",
)
@pytest.mark.parametrize(
    ("model", "stale"),
    [
        ("clip", "processor_config.json"),
        ("align", "processor_config.json"),
        ("align", "tokenizer.json"),
        ("align", "tokenizer_config.json"),
        ("align without a vocabulary", "vocab.txt"),
    ],
)
def test_files_that_would_be_read_first_are_refused(model: str, stale: str, align: DualEncoder, tmp_path: Path) -> None:
    converted = fastclip.create_model("ViT-tiny") if model == "clip" else align
    if "without" in model:
        assert align.config is not None
        converted = DualEncoder(align.visual, align.text, config=replace(align.config, folder=None))
    (tmp_path / stale).write_text("{}")
    with pytest.raises(
        ValueError, match=f"contains {stale} of another model: choose another folder, or remove that file"
    ):
        convert(converted, tmp_path, form="huggingface")
    assert [file.name for file in tmp_path.iterdir()] == [stale]
