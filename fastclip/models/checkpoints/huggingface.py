"""Translate configurations of Hugging Face's CLIPModel and AlignModel, in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastclip.models.config import (
    BertConfig,
    CLIPTextConfig,
    EfficientNetConfig,
    ModelConfig,
    PreprocessConfig,
    ViTConfig,
)
from fastclip.models.processor import read_image_processor, write_image_processor
from fastclip.models.tokenizers.vocabulary import vocabulary_in
from fastclip.system.reading import read_json

__all__ = ["config_from_huggingface", "write_huggingface_config"]

# Width and depth of the EfficientNet models, relative to B0 (Tan and Le 2019; L2: Xie et al. 2020)
_EFFICIENTNETS = {
    (1.0, 1.0): "b0",
    (1.0, 1.1): "b1",
    (1.1, 1.2): "b2",
    (1.2, 1.4): "b3",
    (1.4, 1.8): "b4",
    (1.6, 2.2): "b5",
    (1.8, 2.6): "b6",
    (2.0, 3.1): "b7",
    (2.2, 3.6): "b8",
    (4.3, 5.3): "l2",
}
# Names of options: ours -> Hugging Face's
_TEXT = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "vocab_size": "vocab_size",
}
_CLIP_TEXT = _TEXT | {"context_length": "max_position_embeddings"}
_BERT = _TEXT | {"max_positions": "max_position_embeddings", "dropout": "hidden_dropout_prob"}
_VIT = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "patch_size": "patch_size",
    "image_size": "image_size",
}
_CLIP_PROCESSOR, _ALIGN_PROCESSOR = "CLIPImageProcessor", "EfficientNetImageProcessor"
_HALF = (0.5, 0.5, 0.5)
_ALIGN = PreprocessConfig(_HALF, _HALF, "bilinear", resize_size=346, resize_mode="squash", train_crop="flipped")


def config_from_huggingface(folder: Path, kind: str | None) -> ModelConfig:
    """Read the configuration of a CLIPModel or an AlignModel from its folder.

    Args:
        folder: folder of the Hugging Face model.
        kind: the model type in its ``config.json``: "clip" or "align", or None if the file states none.

    Raises:
        ValueError: the model type is neither "clip" nor "align", or the towers of this package do not support the
            model's sizes or activations.
    """
    where = folder / "config.json"
    if kind not in ("clip", "align"):
        raise ValueError(
            f"{where}: model_type must be 'fastclip', 'clip' or 'align', got {kind!r}; models of "
            "other types cannot be read"
        )
    import transformers

    config_class = transformers.CLIPConfig if kind == "clip" else transformers.AlignConfig
    try:
        theirs = config_class.from_dict(read_json(where))
        config = _from_clip(theirs, folder) if kind == "clip" else _from_align(theirs, folder)
    except ValueError as error:
        if str(folder) in str(error):
            raise
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # transformers may raise any exception, also of a private class
        message = " ".join(str(error).split())
        raise ValueError(f"{where} is not a valid configuration of a {kind} model: {message}") from error
    # transformers checks few types and no sizes, so the result is checked like a configuration file of this package
    return ModelConfig.from_dict(config.to_dict(), where=str(where), folder=folder)


def _text_config(theirs: Any, folder: Path) -> Any:
    """Return the text part of a configuration.

    Raises:
        ValueError: the hidden width of the MLPs is not 4 times the width, which the text towers here assume.
    """
    text = theirs.text_config
    if text.intermediate_size != 4 * text.hidden_size:
        raise ValueError(
            f"{folder / 'config.json'}: intermediate_size of the text tower must be 4 times its hidden_size, "
            f"got {text.intermediate_size}"
        )
    return text


def _ours(part: Any, names: Mapping[str, str]) -> dict[str, Any]:
    return {ours: getattr(part, theirs) for ours, theirs in names.items()}


def _theirs(part: Any, names: Mapping[str, str]) -> dict[str, Any]:
    return {theirs: getattr(part, ours) for ours, theirs in names.items()}


def _from_clip(theirs: Any, folder: Path) -> ModelConfig:
    image, text = theirs.vision_config, _text_config(theirs, folder)
    where = folder / "config.json"
    activations = {image.hidden_act, text.hidden_act}
    if len(activations) > 1 or not activations <= {"gelu", "quick_gelu"}:
        raise ValueError(f"{where}: hidden_act must be gelu or quick_gelu, equal in both towers, got {activations}")
    for part in (image, text):
        if part.layer_norm_eps != 1e-5:
            raise ValueError(f"{where}: layer_norm_eps must be 1e-5, got {part.layer_norm_eps}")
    processor = read_image_processor(folder, _CLIP_PROCESSOR)
    if processor is not None and processor.image_size != image.image_size:
        raise ValueError(
            f"{processor.where}: size and crop_size give images of {processor.image_size} pixels, but the image tower "
            f"of config.json takes image_size {image.image_size}"
        )
    usual = PreprocessConfig()
    return ModelConfig(
        embed_dim=theirs.projection_dim,
        quick_gelu=activations == {"quick_gelu"},
        vision_cfg=ViTConfig(
            **_ours(image, _VIT),
            head_width=image.hidden_size // image.num_attention_heads,
            mlp_ratio=image.intermediate_size / image.hidden_size,
        ),
        text_cfg=CLIPTextConfig(**_ours(text, _CLIP_TEXT)),
        preprocess_cfg=usual if processor is None else processor.preprocess(usual.train_crop),
        folder=folder,
    )


def _from_align(theirs: Any, folder: Path) -> ModelConfig:
    import transformers

    image, text = theirs.vision_config, _text_config(theirs, folder)
    where = folder / "config.json"
    name = _EFFICIENTNETS.get((image.width_coefficient, image.depth_coefficient))
    usual = transformers.AlignVisionConfig()
    # Width and depth identify a model of the family only if the shapes before scaling are those of B0.
    shapes = ("in_channels", "out_channels", "kernel_sizes", "strides", "num_block_repeats", "expand_ratios")
    if name is None or any(list(getattr(image, s)) != list(getattr(usual, s)) for s in shapes):
        raise ValueError(f"{where}: the image tower must be an EfficientNet from B0 to B8, or L2")
    # timm's EfficientNet and this package's BERT have no other activations or pooling
    if image.hidden_act not in ("swish", "silu") or image.pooling_type != "mean" or text.hidden_act != "gelu":
        raise ValueError(
            f"{where}: hidden_act must be swish in the image tower and gelu in the text tower, and pooling_type mean"
        )
    processor = read_image_processor(folder, _ALIGN_PROCESSOR)
    return ModelConfig(
        embed_dim=theirs.projection_dim,
        init_logit_scale=0.0,
        vision_cfg=EfficientNetConfig(
            timm_model_name=f"tf_efficientnet_{name}",
            # image_size in Hugging Face's configuration is not the image size used in training
            image_size=289 if processor is None else processor.image_size,
            depthwise_padding=tuple(image.depthwise_padding),
        ),
        text_cfg=BertConfig(
            **_ours(text, _BERT),
            vocabulary=vocabulary_in(folder),
            context_length=min(BertConfig.context_length, text.max_position_embeddings),
        ),
        preprocess_cfg=_ALIGN if processor is None else processor.preprocess(_ALIGN.train_crop),
        folder=folder,
    )


def write_huggingface_config(config: ModelConfig, folder: Path) -> None:
    """Write ``config.json`` and ``preprocessor_config.json`` of a CLIPModel or an AlignModel into a folder."""
    image, text = config.vision_cfg, config.text_cfg
    if isinstance(image, ViTConfig) and isinstance(text, CLIPTextConfig):
        theirs, kind = _clip_config(config, image, text), _CLIP_PROCESSOR
    else:
        assert isinstance(image, EfficientNetConfig) and isinstance(text, BertConfig)
        theirs, kind = _align_config(config, image, text), _ALIGN_PROCESSOR
    theirs.save_pretrained(folder)
    write_image_processor(folder, kind, config.preprocess_cfg, image.image_size)


def _clip_config(config: ModelConfig, image: ViTConfig, text: CLIPTextConfig) -> Any:
    import transformers

    both = {"hidden_act": "quick_gelu" if config.quick_gelu else "gelu", "projection_dim": config.embed_dim}
    return transformers.CLIPConfig(
        architectures=["CLIPModel"],
        projection_dim=config.embed_dim,
        text_config={
            **both,
            **_theirs(text, _CLIP_TEXT),
            "intermediate_size": 4 * text.width,
            # in CLIP's vocabulary, start and end are always the last two tokens
            "bos_token_id": text.vocab_size - 2,
            "eos_token_id": text.vocab_size - 1,
        },
        vision_config={
            **both,
            **_theirs(image, _VIT),
            "intermediate_size": int(image.mlp_ratio * image.width),
            "num_attention_heads": image.width // image.head_width,
        },
    )


def _align_config(config: ModelConfig, image: EfficientNetConfig, text: BertConfig) -> Any:
    import transformers

    names = {f"tf_efficientnet_{name}": sizes for sizes, name in _EFFICIENTNETS.items()}
    width, depth = names[image.timm_model_name]
    return transformers.AlignConfig(
        architectures=["AlignModel"],
        projection_dim=config.embed_dim,
        text_config={
            **_theirs(text, _BERT),
            "intermediate_size": 4 * text.width,
            "attention_probs_dropout_prob": text.dropout,
        },
        vision_config={
            "width_coefficient": width,
            "depth_coefficient": depth,
            "depthwise_padding": list(image.depthwise_padding or ()),
            "hidden_dim": int(1280 * width),  # channels of B0's last convolution
            "image_size": image.image_size,
        },
    )
