"""Filling a model from a checkpoint: what configuration it has, and which tensor goes where."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastclip.models.checkpoints.parameter_names import Mapped, map_names
from fastclip.models.checkpoints.reading import Checkpoint, read_checkpoint, read_config
from fastclip.models.config import (
    OPEN_CLIP_PREPROCESS,
    BertConfig,
    CoSwinConfig,
    EfficientNetConfig,
    ModelConfig,
    ResNetConfig,
    ViTConfig,
    list_models,
    load_config,
)

__all__ = ["describe_misfit", "load_weights", "named_config", "resolve"]

logger = logging.getLogger(__name__)
_SHOWN = 20  # names of each kind in an error
_RESNET_STRIDE = 32  # pixels a place of the last stage
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def named_config(name: str) -> ModelConfig:
    """Return the configuration of a model's name, of a JSON file, or of a folder with one."""
    if _is_folder(name):
        config = read_config(Path(name))
        if config is None:
            raise FileNotFoundError(f"the folder {name} holds neither config.json nor open_clip_config.json")
        return config
    return load_config(name)


def _is_folder(name: str) -> bool:
    """Return True for a folder; a model's name is that model, whatever lies in the working directory."""
    return name not in list_models() and name != "" and Path(name).is_dir()


def resolve(name: str | None, pretrained: str | Path | None) -> tuple[ModelConfig, Checkpoint | None]:
    """Return the configuration that name and checkpoint agree on, with the checkpoint's sizes, and the checkpoint.

    Raises:
        ValueError: neither of both is given, or they contradict each other.
        FileNotFoundError: a path does not exist.
    """
    if name is not None and pretrained is None and _is_folder(name):
        name, pretrained = None, name
    if pretrained is None:
        if name is None:
            raise ValueError("create_model needs a name or pretrained=")
        return load_config(name), None
    named = None if name is None else load_config(name)
    checkpoint = read_checkpoint(pretrained)
    if named is not None:
        config = _agreed(named, checkpoint, name or "", str(pretrained))
    elif checkpoint.config is not None:
        config = checkpoint.config
    else:
        raise ValueError(f"{pretrained} holds no configuration: name the model, as in create_model('ViT-B-32', ...)")
    try:
        config = _with_sizes_of(config, checkpoint, name)
    except ValueError as error:  # a form without such a model
        raise ValueError(f"{pretrained} does not fit {name or 'its configuration'}: {error}") from error
    if "logit_bias" in checkpoint.tensors and config.init_logit_bias is None:
        config = replace(config, init_logit_bias=0.0)  # the weights replace it
    return config, checkpoint


def _agreed(config: ModelConfig, checkpoint: Checkpoint, name: str, pretrained: str) -> ModelConfig:
    """Return a named configuration with what lies beside the weights, is not seen in them, and changes features."""
    theirs = checkpoint.config
    if checkpoint.quick_gelu is not None and checkpoint.quick_gelu != config.quick_gelu:
        if theirs is not None:
            kinds = {True: "QuickGELU", False: "GELU"}
            raise ValueError(
                f"{pretrained} was trained with {kinds[theirs.quick_gelu]}, {name} means {kinds[config.quick_gelu]}: "
                f"{'append' if theirs.quick_gelu else 'leave out'} -quickgelu"
            )
        logger.warning("%s is OpenAI's, which means QuickGELU: %s is made with it", pretrained, name)
        config = replace(config, quick_gelu=True)
    if theirs is None:
        return config
    for tower, option in (("vision_cfg", "head_width"), ("text_cfg", "heads")):  # weights of any split have one shape
        said, true = (getattr(getattr(c, tower), option, None) for c in (config, theirs))
        if said != true and None not in (said, true):
            raise ValueError(f"{pretrained} has {option} {true} in its {tower}, {name} says {said}: leave the name out")
    image, their_image = config.vision_cfg, theirs.vision_cfg
    if isinstance(image, EfficientNetConfig) and isinstance(their_image, EfficientNetConfig):
        config = replace(config, vision_cfg=replace(image, depthwise_padding=their_image.depthwise_padding))
    named, trained = config.preprocess_cfg, theirs.preprocess_cfg
    changed = {
        key: getattr(trained, key) for key in OPEN_CLIP_PREPROCESS if getattr(trained, key) != getattr(named, key)
    }
    if changed:
        options = ", ".join(f"{key} {value}" for key, value in changed.items())
        logger.warning("%s wants its pictures with %s, other than %s", pretrained, options, name)
        config = replace(config, preprocess_cfg=replace(named, **changed))
    return config


def _image_positions(config: ModelConfig) -> str:
    """Return how the names end of the image tower's parameters that depend on the picture's size; "" for none."""
    endings = {ViTConfig: "visual.pos_embed", ResNetConfig: "visual.head.pos_embed"}
    endings |= {CoSwinConfig: "relative_position_bias_table"}
    return endings.get(type(config.vision_cfg), "")


def _text_positions(config: ModelConfig) -> str:
    bert = isinstance(config.text_cfg, BertConfig)
    return "text.bert.embeddings.position_embeddings.weight" if bert else "text.positional_embedding"


def _with_sizes_of(config: ModelConfig, checkpoint: Checkpoint, name: str | None) -> ModelConfig:
    """Return the configuration with the sizes that a checkpoint's position embeddings have.

    What it says otherwise would be wrong: interpolated positions are those of no training. All other sizes must be the
    configuration's (`load_weights`), and heads leave no trace in the weights.
    """
    sizes: dict[str, int] = {}
    image, text = config.vision_cfg, config.text_cfg
    rows = _rows(config, checkpoint, _text_positions(config))
    if isinstance(text, BertConfig):
        if rows is not None:
            config = replace(config, text_cfg=replace(text, max_positions=rows))
            sizes["context_length"] = min(text.context_length, rows)
    elif rows is not None:
        sizes["context_length"] = rows
    if isinstance(image, ViTConfig | ResNetConfig):
        step = image.patch_size if isinstance(image, ViTConfig) else _RESNET_STRIDE
        rows = _rows(config, checkpoint, _image_positions(config))
        side = 0 if rows is None else math.isqrt(rows - 1)  # one row is the class token's
        if side and side**2 + 1 == rows and side != image.image_size // step:
            sizes["image_size"] = side * step
    said = {"context_length": text.context_length, "image_size": image.image_size}
    if other := {size: value for size, value in sizes.items() if value != said[size]}:
        changes = " and ".join(f"{size} {value} in place of {said[size]}" for size, value in other.items())
        logger.warning("%s has %s, which %s says", checkpoint.path, changes, name or "its configuration")
        config = config.with_changes(**other)
    return config


def _rows(config: ModelConfig, checkpoint: Checkpoint, name: str) -> int | None:
    """Return the places of a position embedding; None where the checkpoint has none, which `load_weights` reports."""
    tensor = checkpoint.tensors.get(map_names([name], config, checkpoint.form)[0].theirs[0])
    return tensor.shape[-2] if tensor is not None and tensor.dim() >= 2 and tensor.shape[-2] > 1 else None


def load_weights(
    model: nn.Module, config: ModelConfig, checkpoint: Checkpoint, name: str, *, changed: Collection[str]
) -> None:
    """Fill a model of `config`, which messages call `name`, from a checkpoint that fits it whole.

    Args:
        changed: options that the caller chose and the checkpoint need not have: positions of another ``image_size`` or
            ``context_length`` are interpolated, and ``init_logit_bias`` may be missing.

    Raises:
        ValueError: parameters are missing, unexpected, of another shape, or hold what is no weight; they are named.
    """
    state = model.state_dict()
    mapped = map_names(state, config, checkpoint.form)
    endings = {"image_size": _image_positions(config), "context_length": _text_positions(config)}
    resized = tuple(ending for option, ending in endings.items() if option in changed and ending)
    optional = {"logit_bias"} if "init_logit_bias" in changed else set()  # called so in every form that has it
    expected = dict.fromkeys(theirs for m in mapped for theirs in m.theirs)
    tensors, misshapen = _fit(model, state, checkpoint, mapped, resized)
    if misfit := describe_misfit(expected, checkpoint.tensors, misshapen, optional):
        raise ValueError(f"the checkpoint {checkpoint.path} does not fit {name}: {misfit}")
    model.load_state_dict(tensors, strict=not optional)


def describe_misfit(
    expected: Collection[str], given: Collection[str], misshapen: list[str], optional: Collection[str] = ()
) -> str:
    """Return the names of parameters that do not fit, in words; "" for none."""
    missing = [name for name in expected if name not in given and name not in optional]
    unexpected = [name for name in given if name not in expected]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    return "; ".join(_list(kind, names) for kind, names in kinds.items() if names)


def _list(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{more}"


def _fit(
    model: nn.Module,
    state: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    mapped: Iterable[Mapped],
    resized: tuple[str, ...],
) -> tuple[dict[str, Tensor], list[str]]:
    """Return their tensors under our names, the `resized` ones interpolated, and a line for each of another shape."""
    theirs = checkpoint.tensors
    tensors, misshapen = {}, []
    for m in mapped:
        parts, wanted = [theirs[name] for name in m.theirs if name in theirs], state[m.ours].shape
        if len(parts) < len(m.theirs):
            continue  # missing
        try:
            tensor: Tensor | None = m.layout.read(parts)
        except (RuntimeError, IndexError):  # a shape that the layout cannot come from
            tensor = None
        if tensor is not None and tensor.shape != wanted:
            before = tuple(tensor.shape)
            tensor = _resize(model, m.ours, tensor, wanted) if m.ours.endswith(resized) else None
            if tensor is not None:
                logger.warning("%s interpolated from %s to %s", m.ours, before, tuple(wanted))
        if tensor is None:
            shapes = ", ".join(f"{name} {tuple(part.shape)}" for name, part in zip(m.theirs, parts))
            misshapen.append(f"{shapes} for {tuple(wanted)}")
        else:
            _check_numbers(m, tensor, state[m.ours].dtype, checkpoint.path)
            tensors[m.ours] = tensor
    return tensors, misshapen


def _check_numbers(m: Mapped, tensor: Tensor, wanted: torch.dtype, path: Path) -> None:
    """Refuse what would be converted without a word: quantised, whole or complex numbers as weights, NaN, infinity."""
    names = ", ".join(m.theirs)
    if tensor.is_complex() or (wanted.is_floating_point and tensor.dtype not in _FLOATS):
        raise ValueError(f"{path}: {names} is {tensor.dtype}, and weights are one of {', '.join(map(str, _FLOATS))}")
    if tensor.numel() and not all(x.isfinite() for x in tensor.aminmax()):
        raise ValueError(f"{path}: {names} holds NaN or infinity, as after a training that diverged")


def _resize(model: nn.Module, name: str, tensor: Tensor, wanted: torch.Size) -> Tensor | None:
    """Return a position embedding for another resolution or length; None for anything else."""
    from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table

    if tensor.dim() != len(wanted) or tensor.shape[-1] != wanted[-1]:
        return None
    tensor = tensor.float()  # in 16 bits the sums of an interpolation would be rounded
    if name in ("visual.pos_embed", "visual.head.pos_embed"):  # (1 or none, class token and places, width)
        places, side = tensor.shape[-2] - 1, round((wanted[-2] - 1) ** 0.5)
        if round(places**0.5) ** 2 != places:  # no square: of another tower
            return None
        flat = tensor.reshape(1, -1, wanted[-1])
        return resample_abs_pos_embed(flat, [side, side], num_prefix_tokens=1).reshape(wanted)
    if name.endswith("relative_position_bias_table"):
        block: Any = model.get_submodule(name.rpartition(".")[0])
        return resize_rel_pos_bias_table(tensor, new_window_size=block.window_size, new_bias_shape=tuple(wanted))
    if name == "text.positional_embedding":
        return F.interpolate(tensor.T[None], size=wanted[0], mode="linear", align_corners=False)[0].T
    return None
