"""Map parameter names and tensor layouts to those of open_clip and Hugging Face.

Each format has one table, which is used in both directions. A rule matches names of this package, and gives the names
and the layout in the other format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastclip.models.config import BertConfig, EfficientNetConfig, ModelConfig, ViTConfig

__all__ = ["Mapped", "map_names", "to_form"]


class Layout(NamedTuple):
    """Conversion of a parameter between two formats, in both directions."""

    read: Callable[[Sequence[Tensor]], Tensor]  # theirs -> ours
    write: Callable[[Tensor], Sequence[Tensor]]  # ours -> theirs


SAME = Layout(lambda theirs: theirs[0], lambda ours: [ours])
TRANSPOSED = Layout(lambda theirs: theirs[0].T, lambda ours: [ours.T])
BATCHED = Layout(lambda theirs: theirs[0][None], lambda ours: [ours[0]])
TOKEN = Layout(lambda theirs: theirs[0].reshape(1, 1, -1), lambda ours: [ours.reshape(-1)])
JOINED = Layout(lambda theirs: torch.cat(list(theirs)), lambda ours: ours.chunk(3))  # query, key, value
SCALAR = Layout(lambda theirs: theirs[0].reshape(()), lambda ours: [ours])
# AlignModel divides its logits by a temperature; the models here multiply them by the exponential of logit_scale
TEMPERATURE = Layout(lambda theirs: -theirs[0].reshape(()).log(), lambda ours: [(-ours).exp()])


class Rule(NamedTuple):
    """Row of a table of names: a pattern for names of this package, and their counterparts in another format."""

    ours: str  # regular expression that matches a whole name
    theirs: str | tuple[str, ...]  # templates of names, with references to the groups of the expression
    layout: Layout = SAME
    expands: bool | None = None  # restricts the rule to EfficientNet blocks that do or do not widen their input


_SCALARS = (Rule(r"(logit_scale|logit_bias)", r"\1", SCALAR),)
_OPEN_CLIP_TEXT = (Rule(r"text\.(.+)", r"\1"),)
_OPEN_CLIP_VIT = (
    Rule(r"visual\.cls_token", "visual.class_embedding", TOKEN),
    Rule(r"visual\.pos_embed", "visual.positional_embedding", BATCHED),
    Rule(r"visual\.patch_embed\.proj\.weight", "visual.conv1.weight"),
    Rule(r"visual\.norm_pre\.(\w+)", r"visual.ln_pre.\1"),
    Rule(r"visual\.blocks\.(\d+)\.norm([12])\.(\w+)", r"visual.transformer.resblocks.\1.ln_\2.\3"),
    Rule(r"visual\.blocks\.(\d+)\.attn\.qkv\.(\w+)", r"visual.transformer.resblocks.\1.attn.in_proj_\2"),
    Rule(r"visual\.blocks\.(\d+)\.attn\.proj\.(\w+)", r"visual.transformer.resblocks.\1.attn.out_proj.\2"),
    Rule(r"visual\.blocks\.(\d+)\.mlp\.fc1\.(\w+)", r"visual.transformer.resblocks.\1.mlp.c_fc.\2"),
    Rule(r"visual\.blocks\.(\d+)\.mlp\.fc2\.(\w+)", r"visual.transformer.resblocks.\1.mlp.c_proj.\2"),
    Rule(r"visual\.norm\.(\w+)", r"visual.ln_post.\1"),
    Rule(r"visual\.head\.weight", "visual.proj", TRANSPOSED),
)
# The number of a stage in braces counts from 0 here and from 1 in open_clip: map_names adds 1.
_OPEN_CLIP_RESNET = (
    Rule(r"visual\.stem\.conv(\d)\.conv\.weight", r"visual.conv\1.weight"),
    Rule(r"visual\.stem\.conv(\d)\.bn\.(\w+)", r"visual.bn\1.\2"),
    Rule(r"visual\.stages\.(\d+)\.(\d+)\.conv(\d)_\w+\.conv\.weight", r"visual.layer{\1}.\2.conv\3.weight"),
    Rule(r"visual\.stages\.(\d+)\.(\d+)\.conv(\d)_\w+\.bn\.(\w+)", r"visual.layer{\1}.\2.bn\3.\4"),
    Rule(r"visual\.stages\.(\d+)\.(\d+)\.shortcut\.conv\.conv\.weight", r"visual.layer{\1}.\2.downsample.0.weight"),
    Rule(r"visual\.stages\.(\d+)\.(\d+)\.shortcut\.conv\.bn\.(\w+)", r"visual.layer{\1}.\2.downsample.1.\3"),
    Rule(r"visual\.head\.pos_embed", "visual.attnpool.positional_embedding"),
    Rule(r"visual\.head\.([qkv])\.(\w+)", r"visual.attnpool.\1_proj.\2"),
    Rule(r"visual\.head\.proj\.(\w+)", r"visual.attnpool.c_proj.\1"),
)
_QKV = ("q_proj", "k_proj", "v_proj")
_HF_CLIP = (
    Rule(r"visual\.cls_token", "vision_model.embeddings.class_embedding", TOKEN),
    Rule(r"visual\.pos_embed", "vision_model.embeddings.position_embedding.weight", BATCHED),
    Rule(r"visual\.patch_embed\.proj\.weight", "vision_model.embeddings.patch_embedding.weight"),
    Rule(r"visual\.norm_pre\.(\w+)", r"vision_model.pre_layrnorm.\1"),
    Rule(r"visual\.blocks\.(\d+)\.norm([12])\.(\w+)", r"vision_model.encoder.layers.\1.layer_norm\2.\3"),
    Rule(
        r"visual\.blocks\.(\d+)\.attn\.qkv\.(\w+)",
        tuple(rf"vision_model.encoder.layers.\1.self_attn.{part}.\2" for part in _QKV),
        JOINED,
    ),
    Rule(r"visual\.blocks\.(\d+)\.attn\.proj\.(\w+)", r"vision_model.encoder.layers.\1.self_attn.out_proj.\2"),
    Rule(r"visual\.blocks\.(\d+)\.mlp\.(fc[12])\.(\w+)", r"vision_model.encoder.layers.\1.mlp.\2.\3"),
    Rule(r"visual\.norm\.(\w+)", r"vision_model.post_layernorm.\1"),
    Rule(r"visual\.head\.weight", "visual_projection.weight"),
    Rule(r"text\.token_embedding\.weight", "text_model.embeddings.token_embedding.weight"),
    Rule(r"text\.positional_embedding", "text_model.embeddings.position_embedding.weight"),
    Rule(r"text\.transformer\.resblocks\.(\d+)\.ln_([12])\.(\w+)", r"text_model.encoder.layers.\1.layer_norm\2.\3"),
    Rule(
        r"text\.transformer\.resblocks\.(\d+)\.attn\.in_proj_(\w+)",
        tuple(rf"text_model.encoder.layers.\1.self_attn.{part}.\2" for part in _QKV),
        JOINED,
    ),
    Rule(
        r"text\.transformer\.resblocks\.(\d+)\.attn\.out_proj\.(\w+)",
        r"text_model.encoder.layers.\1.self_attn.out_proj.\2",
    ),
    Rule(r"text\.transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(\w+)", r"text_model.encoder.layers.\1.mlp.fc1.\2"),
    Rule(r"text\.transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(\w+)", r"text_model.encoder.layers.\1.mlp.fc2.\2"),
    Rule(r"text\.ln_final\.(\w+)", r"text_model.final_layer_norm.\1"),
    Rule(r"text\.text_projection", "text_projection.weight", TRANSPOSED),
)
# map_names replaces [stage.block] by the block's number in the whole tower.
_BLOCK = r"visual\.blocks\.(\d+\.\d+)"
_HF_BLOCK = r"vision_model.encoder.blocks.[\1]"
# Blocks that do not widen their input have no expansion convolution. In these blocks timm calls the last convolution
# conv_pw; in the others conv_pw is the expansion and conv_pwl the last convolution.
_HF_ALIGN = (
    Rule(r"visual\.conv_stem\.weight", "vision_model.embeddings.convolution.weight"),
    Rule(r"visual\.bn1\.(\w+)", r"vision_model.embeddings.batchnorm.\1"),
    Rule(_BLOCK + r"\.conv_dw\.weight", _HF_BLOCK + ".depthwise_conv.depthwise_conv.weight"),
    Rule(_BLOCK + r"\.se\.conv_(reduce|expand)\.(\w+)", _HF_BLOCK + r".squeeze_excite.\2.\3"),
    Rule(_BLOCK + r"\.conv_pwl\.weight", _HF_BLOCK + ".projection.project_conv.weight"),
    Rule(_BLOCK + r"\.bn3\.(\w+)", _HF_BLOCK + r".projection.project_bn.\2"),
    Rule(_BLOCK + r"\.conv_pw\.weight", _HF_BLOCK + ".expansion.expand_conv.weight", expands=True),
    Rule(_BLOCK + r"\.bn1\.(\w+)", _HF_BLOCK + r".expansion.expand_bn.\2", expands=True),
    Rule(_BLOCK + r"\.bn2\.(\w+)", _HF_BLOCK + r".depthwise_conv.depthwise_norm.\2", expands=True),
    Rule(_BLOCK + r"\.conv_pw\.weight", _HF_BLOCK + ".projection.project_conv.weight", expands=False),
    Rule(_BLOCK + r"\.bn1\.(\w+)", _HF_BLOCK + r".depthwise_conv.depthwise_norm.\2", expands=False),
    Rule(_BLOCK + r"\.bn2\.(\w+)", _HF_BLOCK + r".projection.project_bn.\2", expands=False),
    Rule(r"text\.bert\.(.+)", r"text_model.\1"),
    Rule(r"text\.proj\.(\w+)", r"text_projection.\1"),
    Rule(r"logit_scale", "temperature", TEMPERATURE),
)


class Mapped(NamedTuple):
    """A parameter's name here, the names of its tensors in another format, and the conversion between them."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout


def map_names(names: Iterable[str], config: ModelConfig, form: str) -> list[Mapped]:
    """Map the names of a model's state dict to another format.

    Args:
        names: names of the state dict.
        config: configuration of the model.
        form: "fastclip", "open_clip" or "huggingface".

    Returns:
        For each name, the names of the tensors in the other format, and how to convert between the two.

    Raises:
        ValueError: the format is unknown, or cannot represent this architecture.
    """
    names = list(names)
    rules = _rules(config, form)
    blocks = dict.fromkeys(match[1] for name in names if (match := re.match(_BLOCK, name)))
    # timm numbers the blocks within each stage, transformers throughout the whole tower
    numbers = {block: str(number) for number, block in enumerate(blocks)}
    expanding = {block for block in numbers if f"visual.blocks.{block}.conv_pwl.weight" in names}
    mapped = []
    for name in names:
        block = re.match(_BLOCK, name)
        expands = None if block is None else block[1] in expanding
        for rule in rules:
            match = re.fullmatch(rule.ours, name) if rule.expands in (None, expands) else None
            if match:
                templates = (rule.theirs,) if isinstance(rule.theirs, str) else rule.theirs
                theirs = [match.expand(template) for template in templates]
                theirs = [re.sub(r"\[([\d.]+)\]", lambda m: numbers[m[1]], t) for t in theirs]
                theirs = [re.sub(r"\{(\d+)\}", lambda m: str(int(m[1]) + 1), t) for t in theirs]
                mapped.append(Mapped(name, tuple(theirs), rule.layout))
                break
        else:
            raise ValueError(
                f"the format {form} cannot represent the parameter {name}: use another format, or a model without it"
            )
    return mapped


def _rules(config: ModelConfig, form: str) -> tuple[Rule, ...]:
    image, text = config.vision_cfg, config.text_cfg
    if form == "fastclip":
        return (Rule(r"(.+)", r"\1"),)
    if form == "open_clip" and not isinstance(text, BertConfig) and image.tower in ("vit", "resnet"):
        return (*_SCALARS, *(_OPEN_CLIP_VIT if isinstance(image, ViTConfig) else _OPEN_CLIP_RESNET), *_OPEN_CLIP_TEXT)
    if form == "huggingface" and isinstance(image, ViTConfig) and not isinstance(text, BertConfig):
        return (Rule("logit_scale", "logit_scale", SCALAR), *_HF_CLIP)
    if form == "huggingface" and isinstance(image, EfficientNetConfig) and isinstance(text, BertConfig):
        if not image.timm_model_name.startswith("tf_efficientnet_"):
            raise ValueError(f"Hugging Face's AlignModel does not support the image tower {image.timm_model_name}")
        return _HF_ALIGN
    if form not in ("open_clip", "huggingface"):
        raise ValueError(f"the format must be 'fastclip', 'open_clip' or 'huggingface', got {form!r}")
    raise ValueError(
        f"the format {form} does not support the image tower {image.tower} with the text tower {text.tower}"
    )


def to_form(tensors: Mapping[str, Tensor], mapped: Iterable[Mapped]) -> dict[str, Tensor]:
    """Convert tensors to the names and layouts of `mapped`; the results are contiguous, as safetensors requires."""
    return {
        name: tensor.contiguous()
        for m in mapped
        for name, tensor in zip(m.theirs, m.layout.write(tensors[m.ours].detach()))
    }
