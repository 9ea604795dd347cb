"""Load a checkpoint into a model: determine the configuration, and assign each tensor to a parameter."""

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
_SHOWN = 20  # parameter names of each kind that an error lists
_RESNET_STRIDE = 32  # pixels per position of the last stage
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def named_config(name: str) -> ModelConfig:
    """Return the configuration of a model, given by its name, by a JSON file, or by a folder that contains one.

    Raises:
        ValueError: the name is unknown, or the file is not a valid configuration.
        FileNotFoundError: the file does not exist, or the folder contains no configuration.
    """
    if _is_folder(name):
        config = read_config(Path(name))
        if config is None:
            raise FileNotFoundError(f"the folder {name} contains neither config.json nor open_clip_config.json")
        return config
    return load_config(name)


def _is_folder(name: str) -> bool:
    """Return True if `name` is a folder; a known model's name never is, even if such a folder exists."""
    return name not in list_models() and name != "" and Path(name).is_dir()


def resolve(name: str | None, pretrained: str | Path | None) -> tuple[ModelConfig, Checkpoint | None]:
    """Reconcile a model's name with a checkpoint, and return the configuration and the checkpoint.

    The sizes of the configuration are those of the checkpoint's weights.

    Args:
        name: model name, path of a configuration, or None.
        pretrained: path of a checkpoint, or None.

    Raises:
        ValueError: both are None, or name and checkpoint contradict each other.
        FileNotFoundError: a path does not exist.
    """
    if name is not None and pretrained is None and _is_folder(name):
        name, pretrained = None, name
    if pretrained is None:
        if name is None:
            raise ValueError("create_model needs the name of a model or pretrained=, the path of a checkpoint")
        return load_config(name), None
    named = None if name is None else load_config(name)
    checkpoint = read_checkpoint(pretrained)
    if named is not None:
        config = _agreed(named, checkpoint, name or "", str(pretrained))
    elif checkpoint.config is not None:
        config = checkpoint.config
    else:
        raise ValueError(
            f"{pretrained} contains no configuration: name the model, with --model ViT-B-32 on the command line or "
            "as in create_model('ViT-B-32', ...)"
        )
    try:
        config = _with_sizes_of(config, checkpoint, name)
    except ValueError as error:  # the checkpoint's format does not support these towers
        raise ValueError(f"{pretrained} does not fit {name or 'its configuration'}: {error}") from error
    if "logit_bias" in checkpoint.tensors and config.init_logit_bias is None:
        config = replace(config, init_logit_bias=0.0)  # replaced by the checkpoint's value when weights are loaded
    return config, checkpoint


def _agreed(config: ModelConfig, checkpoint: Checkpoint, name: str, pretrained: str) -> ModelConfig:
    """Return a named configuration, completed from the configuration that is stored next to the weights.

    Only options that change the features and leave no trace in the weights are taken from there: the activation, the
    padding of an EfficientNet, and the preprocessing. The numbers of attention heads must be equal.
    """
    theirs = checkpoint.config
    if checkpoint.quick_gelu is not None and checkpoint.quick_gelu != config.quick_gelu:
        if theirs is not None:
            kinds = {True: "QuickGELU", False: "GELU"}
            raise ValueError(
                f"{pretrained} was trained with {kinds[theirs.quick_gelu]}, but {name} uses "
                f"{kinds[config.quick_gelu]}: "
                f"{'append -quickgelu to' if theirs.quick_gelu else 'remove -quickgelu from'} the model name"
            )
        logger.warning("%s is an OpenAI checkpoint, so %s is created with QuickGELU", pretrained, name)
        config = replace(config, quick_gelu=True)
    if theirs is None:
        return config
    # The number of heads does not change the shape of any weight, so a difference would go unnoticed.
    for tower, option in (("vision_cfg", "head_width"), ("text_cfg", "heads")):
        said, true = (getattr(getattr(c, tower), option, None) for c in (config, theirs))
        if said != true and None not in (said, true):
            raise ValueError(
                f"{pretrained} has {option} {true} in its {tower}, but {name} has {said}: "
                "name a model that fits, or no model where --model is optional"
            )
    image, their_image = config.vision_cfg, theirs.vision_cfg
    if isinstance(image, EfficientNetConfig) and isinstance(their_image, EfficientNetConfig):
        config = replace(config, vision_cfg=replace(image, depthwise_padding=their_image.depthwise_padding))
    named, trained = config.preprocess_cfg, theirs.preprocess_cfg
    changed = {
        key: getattr(trained, key) for key in OPEN_CLIP_PREPROCESS if getattr(trained, key) != getattr(named, key)
    }
    if changed:
        options = ", ".join(f"{key} {value}" for key, value in changed.items())
        logger.warning("%s requires the preprocessing options %s, which replace those of %s", pretrained, options, name)
        config = replace(config, preprocess_cfg=replace(named, **changed))
    return config


def _image_positions(config: ModelConfig) -> str:
    """Return the ending of the names of all image tower parameters that depend on the image size; "" if none do."""
    endings = {ViTConfig: "visual.pos_embed", ResNetConfig: "visual.head.pos_embed"}
    endings |= {CoSwinConfig: "relative_position_bias_table"}
    return endings.get(type(config.vision_cfg), "")


def _text_positions(config: ModelConfig) -> str:
    bert = isinstance(config.text_cfg, BertConfig)
    return "text.bert.embeddings.position_embeddings.weight" if bert else "text.positional_embedding"


def _with_sizes_of(config: ModelConfig, checkpoint: Checkpoint, name: str | None) -> ModelConfig:
    """Return the configuration with the image size and context length of a checkpoint's position embeddings.

    With other sizes, position embeddings would be interpolated although the caller has not asked for other sizes, and
    interpolated embeddings have not been trained. All other sizes must match the configuration (checked by
    `load_weights`), except for the number of heads, which leaves no trace in the weights.
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
        side = 0 if rows is None else math.isqrt(rows - 1)  # one row belongs to the class token
        if side and side**2 + 1 == rows and side != image.image_size // step:
            sizes["image_size"] = side * step
    said = {"context_length": text.context_length, "image_size": image.image_size}
    if other := {size: value for size, value in sizes.items() if value != said[size]}:
        changes = " and ".join(f"{size} {value} in place of {said[size]}" for size, value in other.items())
        message = "%s has weights for %s; %s is changed accordingly"
        logger.warning(message, checkpoint.path, changes, name or "its configuration")
        config = config.with_changes(**other)
    return config


def _rows(config: ModelConfig, checkpoint: Checkpoint, name: str) -> int | None:
    """Return the number of rows of a position embedding, or None if it is missing, which `load_weights` refuses."""
    tensor = checkpoint.tensors.get(map_names([name], config, checkpoint.form)[0].theirs[0])
    return tensor.shape[-2] if tensor is not None and tensor.dim() >= 2 and tensor.shape[-2] > 1 else None


def load_weights(
    model: nn.Module, config: ModelConfig, checkpoint: Checkpoint, name: str, *, changed: Collection[str]
) -> None:
    """Load the weights of a checkpoint into a model; every parameter must be present and fit.

    Args:
        model: model of `config`.
        config: configuration that the model was built from.
        checkpoint: checkpoint to read the weights from.
        name: name of the model in messages.
        changed: names of the options that the caller set, in which the checkpoint may differ: positions of another
            ``image_size`` or ``context_length`` are interpolated, and ``init_logit_bias`` may be missing.

    Raises:
        ValueError: parameters are missing, unexpected or of another shape, have an unsuitable dtype, or contain NaN or
            infinity. The message names them.
    """
    state = model.state_dict()
    mapped = map_names(state, config, checkpoint.form)
    endings = {"image_size": _image_positions(config), "context_length": _text_positions(config)}
    resized = tuple(ending for option, ending in endings.items() if option in changed and ending)
    optional = {"logit_bias"} if "init_logit_bias" in changed else set()  # the name is the same in every format
    expected = dict.fromkeys(theirs for m in mapped for theirs in m.theirs)
    tensors, misshapen = _fit(model, state, checkpoint, mapped, resized)
    if misfit := describe_misfit(expected, checkpoint.tensors, misshapen, optional):
        raise ValueError(f"the checkpoint {checkpoint.path} does not fit {name}: {misfit}")
    model.load_state_dict(tensors, strict=not optional)


def describe_misfit(
    expected: Collection[str], given: Collection[str], misshapen: list[str], optional: Collection[str] = ()
) -> str:
    """Describe in words which parameters are missing, unexpected or of another shape; "" if all of them fit."""
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
    """Convert a checkpoint's tensors to this package's names and layouts.

    Returns:
        The tensors by parameter name, and one line of text for each tensor whose shape does not fit. Parameters whose
        names end in one of `resized` are interpolated to the model's shape instead.
    """
    theirs = checkpoint.tensors
    tensors, misshapen = {}, []
    for m in mapped:
        parts, wanted = [theirs[name] for name in m.theirs if name in theirs], state[m.ours].shape
        if len(parts) < len(m.theirs):
            continue  # missing
        try:
            tensor: Tensor | None = m.layout.read(parts)
        except (RuntimeError, IndexError):  # the tensor's shape is impossible for this layout
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
    """Refuse tensors that `load_state_dict` would convert silently, and NaN or infinity.

    Quantised, integer and complex tensors cannot be weights.
    """
    names = ", ".join(m.theirs)
    if tensor.is_complex() or (wanted.is_floating_point and tensor.dtype not in _FLOATS):
        raise ValueError(
            f"{path}: {names} is {tensor.dtype}, but weights must have one of the dtypes {', '.join(map(str, _FLOATS))}"
        )
    if tensor.numel() and not all(x.isfinite() for x in tensor.aminmax()):
        raise ValueError(f"{path}: {names} contains NaN or infinity; the training may have diverged")


def _resize(model: nn.Module, name: str, tensor: Tensor, wanted: torch.Size) -> Tensor | None:
    """Interpolate a position embedding to another image size or context length; return None if that is impossible."""
    from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table

    if tensor.dim() != len(wanted) or tensor.shape[-1] != wanted[-1]:
        return None
    tensor = tensor.float()  # 16-bit sums would round the interpolated values
    if name in ("visual.pos_embed", "visual.head.pos_embed"):  # ([1,] 1 + positions, width); row 0 is the class token
        places, side = tensor.shape[-2] - 1, round((wanted[-2] - 1) ** 0.5)
        if round(places**0.5) ** 2 != places:  # not a square of positions: the weights belong to another kind of tower
            return None
        flat = tensor.reshape(1, -1, wanted[-1])
        return resample_abs_pos_embed(flat, [side, side], num_prefix_tokens=1).reshape(wanted)
    if name.endswith("relative_position_bias_table"):
        block: Any = model.get_submodule(name.rpartition(".")[0])
        return resize_rel_pos_bias_table(tensor, new_window_size=block.window_size, new_bias_shape=tuple(wanted))
    if name == "text.positional_embedding":
        return F.interpolate(tensor.T[None], size=wanted[0], mode="linear", align_corners=False)[0].T
    return None
