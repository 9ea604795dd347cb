"""Models, tokenizers and transforms by name, path or checkpoint."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip._lazy import uncollected
from fastclip.models.checkpoint import Checkpoint, read_checkpoint, read_config
from fastclip.models.config import (
    BertConfig,
    CoSwinConfig,
    EfficientNetConfig,
    ModelConfig,
    ResNetConfig,
    ViTConfig,
    list_models,
    load_config,
)
from fastclip.models.conversion import Mapped, map_names
from fastclip.models.dual_encoder import DualEncoder
from fastclip.models.tokenizer import ClipTokenizer
from fastclip.models.transforms import image_transform
from fastclip.models.vocabulary import is_file_name
from fastclip.models.wordpiece import BertTokenizer

if TYPE_CHECKING:
    from torchvision.transforms import Compose

__all__ = [
    "build_model",
    "create_model",
    "create_model_and_transforms",
    "get_tokenizer",
    "load_image_transform",
    "misfit",
    "tokenizer_of",
]

logger = logging.getLogger(__name__)
_Tokenizer = TypeVar("_Tokenizer", ClipTokenizer, BertTokenizer)
_SHOWN = 20  # names of each kind in an error
_RESNET_STRIDE = 32  # pixels a place of the last stage
_PREPROCESSED = ("mean", "std", "interpolation", "resize_mode")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _check_installed(*packages: str) -> None:
    for package in packages:
        if sys.modules.get(package) is None and find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)


_check_installed("timm", "torchvision", "transformers")  # which take long to load, where a model is made


def create_model(
    name: str | None = None,
    pretrained: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    image_size: int | None = None,
    context_length: int | None = None,
    init_logit_scale: float | None = None,
    init_logit_bias: float | None = None,
) -> DualEncoder:
    """An image-text model, in training mode, in float32.

    Args:
        name: one of `list_models`, or the path of a configuration ending in ``.json``. May be left out when
            `pretrained` is a folder that holds its configuration.
        pretrained: path of a checkpoint: a file of OpenAI (TorchScript archive or state dict) or open_clip (.pt,
            .safetensors), or a folder of Hugging Face (CLIPModel, AlignModel), open_clip or `save_pretrained`. Without,
            weights are drawn from torch's global generator as the authors of the model drew them.
        device: "meta" makes no weights at all.
        image_size: pixels, in place of the checkpoint's or else the configuration's. Position embeddings of another
            size are interpolated, and that is logged. Left out, a checkpoint keeps the size that its weights have,
            whatever the configuration says.
        context_length: tokens a text, likewise.
        init_logit_scale: a logarithm, in place of the configuration's (SigLIP: log 10).
        init_logit_bias: given, the model carries ``logit_bias`` for the sigmoid loss (SigLIP: -10).

    Raises:
        ValueError: the name is unknown; the configuration or the checkpoint does not fit, with the names of missing,
            unexpected and mis-shaped parameters; activations contradict each other.
        FileNotFoundError: a path does not exist.
    """
    config, checkpoint = _resolve(name, pretrained)
    if checkpoint is not None:
        try:
            config = _with_own_sizes(config, checkpoint, name)
        except ValueError as error:  # a form without such a model
            raise ValueError(f"{pretrained} does not fit {name or 'its configuration'}: {error}") from error
    config = config.with_changes(
        image_size=image_size,
        context_length=context_length,
        init_logit_scale=init_logit_scale,
        init_logit_bias=init_logit_bias,
    )
    if checkpoint is not None and "logit_bias" in checkpoint.tensors and config.init_logit_bias is None:
        config = replace(config, init_logit_bias=0.0)  # it is read in a moment
    try:
        model = build_model(config, device=device)
    except (ValueError, AssertionError, ArithmeticError, LookupError, TypeError) as error:  # timm asserts
        raise ValueError(f"{name or pretrained}: {error}") from error
    if checkpoint is not None:
        asked = {_image_positions(config)} if image_size is not None else set()
        asked |= {_text_positions(config)} if context_length is not None else set()
        added = {"logit_bias"} if init_logit_bias is not None else set()
        _load(model, checkpoint, name or str(pretrained), may_miss=added, resized=asked)
    return model


def create_model_and_transforms(
    name: str | None = None, pretrained: str | Path | None = None, **options: object
) -> tuple[DualEncoder, Compose, Compose]:
    """A model with its transforms for training and for evaluation, as open_clip's; `options` are `create_model`'s."""
    model = create_model(name, pretrained, **options)  # type: ignore[arg-type]
    assert model.config is not None
    return model, image_transform(model.config, train=True), image_transform(model.config)


def get_tokenizer(
    name: str, *, context_length: int | None = None, vocabulary: str | Path | None = None
) -> ClipTokenizer | BertTokenizer:
    """The tokenizer of a model: texts -> ids (B, context_length).

    Args:
        name: as `create_model`'s, or a folder with a configuration.
        context_length: tokens a text, in place of the configuration's.
        vocabulary: of BERT: a ``vocab.txt`` or ``tokenizer.json``, a folder, or a name in Hugging Face's cache.

    Raises:
        ImportError: open_clip_torch, which holds CLIP's vocabulary, is not installed.
        FileNotFoundError: BERT's vocabulary is neither a file nor in the cache.
    """
    return tokenizer_of(_named_config(name), name, context_length=context_length, vocabulary=vocabulary)


def tokenizer_of(
    config: ModelConfig, name: str, *, context_length: int | None = None, vocabulary: str | Path | None = None
) -> ClipTokenizer | BertTokenizer:
    """As `get_tokenizer`, of a configuration that messages call `name`."""
    text = config.text_cfg
    length = text.context_length if context_length is None else context_length
    if not isinstance(text, BertConfig):
        if vocabulary is not None:
            raise ValueError(f"{name} has CLIP's tokenizer, whose vocabulary is fixed")
        return _checked(ClipTokenizer(context_length=length), text.vocab_size, name)
    if vocabulary is None:
        beside = None if config.folder is None else config.folder / text.vocabulary
        if beside is None or not beside.is_file():
            if is_file_name(text.vocabulary):  # a file, which is not looked for in the working directory
                raise FileNotFoundError(f"the vocabulary {beside or text.vocabulary} of {name} does not exist")
            beside = None
        vocabulary = beside or text.vocabulary
    return _checked(BertTokenizer(vocabulary, context_length=length), text.vocab_size, name)


def _checked(tokenizer: _Tokenizer, vocab_size: int, name: str) -> _Tokenizer:
    """A tokenizer whose ids the text tower has."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"the vocabulary has {tokenizer.vocab_size} tokens, {name} has {vocab_size}")
    return tokenizer


def load_image_transform(name: str, train: bool = False) -> Compose:
    """PIL image -> (3, S, S) float32 for the model of this name, or of a folder with a configuration."""
    return image_transform(_named_config(name), train=train)


def build_model(config: ModelConfig, *, device: torch.device | str = "cpu") -> DualEncoder:
    """A model of `config` with new weights."""
    with uncollected():  # and outside of torch.device, which tensors of timm would obey
        from fastclip.models.towers import image_tower, text_tower

    with torch.device(device), _default_dtype(torch.float32):
        return DualEncoder(
            image_tower(config),
            text_tower(config),
            config=config,
            init_logit_scale=config.init_logit_scale,
            init_logit_bias=config.init_logit_bias,
        )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _named_config(name: str) -> ModelConfig:
    if _is_folder(name):
        config = read_config(Path(name))
        if config is None:
            raise FileNotFoundError(f"the folder {name} holds neither config.json nor open_clip_config.json")
        return config
    return load_config(name)


def _is_folder(name: str) -> bool:
    """Return True for a folder; a model's name is that model, whatever lies in the working directory."""
    return name not in list_models() and name != "" and Path(name).is_dir()


def _resolve(name: str | None, pretrained: str | Path | None) -> tuple[ModelConfig, Checkpoint | None]:
    """The configuration that name and checkpoint agree on."""
    if name is not None and pretrained is None and _is_folder(name):
        name, pretrained = None, name
    if pretrained is None:
        if name is None:
            raise ValueError("create_model needs a name or pretrained=")
        return load_config(name), None
    config = None if name is None else load_config(name)
    checkpoint = read_checkpoint(pretrained)
    theirs = checkpoint.config
    if config is None:
        if theirs is None:
            raise ValueError(
                f"{pretrained} holds no configuration: name the model, as in create_model('ViT-B-32', ...)"
            )
        return theirs, checkpoint
    if checkpoint.quick_gelu is not None and checkpoint.quick_gelu != config.quick_gelu:
        if theirs is not None:
            kinds = {True: "QuickGELU", False: "GELU"}
            raise ValueError(
                f"{pretrained} was trained with {kinds[theirs.quick_gelu]}, {name} means {kinds[config.quick_gelu]}: "
                f"{'append' if theirs.quick_gelu else 'leave out'} -quickgelu"
            )
        logger.warning("%s is OpenAI's, which means QuickGELU: %s is made with it", pretrained, name)
        config = replace(config, quick_gelu=True)
    return config if theirs is None else _with_theirs(config, theirs, name or "", str(pretrained)), checkpoint


def _with_theirs(config: ModelConfig, theirs: ModelConfig, name: str, pretrained: str) -> ModelConfig:
    """A named configuration with what lies beside the weights, is not seen in them, and changes their numbers."""
    for tower, what in (("vision_cfg", "head_width"), ("text_cfg", "heads")):
        said, true = (getattr(getattr(c, tower), what, None) for c in (config, theirs))
        if said != true and None not in (said, true):
            raise ValueError(f"{pretrained} has {what} {true} in its {tower}, {name} says {said}: leave the name out")
    image, their_image = config.vision_cfg, theirs.vision_cfg
    if isinstance(image, EfficientNetConfig) and isinstance(their_image, EfficientNetConfig):
        config = replace(config, vision_cfg=replace(image, depthwise_padding=their_image.depthwise_padding))
    old, of_weights = config.preprocess_cfg, theirs.preprocess_cfg
    changed = {key: getattr(of_weights, key) for key in _PREPROCESSED if getattr(of_weights, key) != getattr(old, key)}
    if changed:
        told = ", ".join(f"{key} {value}" for key, value in changed.items())
        logger.warning("%s wants its pictures with %s, other than %s", pretrained, told, name)
        config = replace(config, preprocess_cfg=replace(old, **changed))
    return config


def _image_positions(config: ModelConfig) -> str:
    """How the names end of the parameters of the image tower that depend on the picture's size; "" of none."""
    endings = {ViTConfig: "visual.pos_embed", ResNetConfig: "visual.head.pos_embed"}
    endings |= {CoSwinConfig: "relative_position_bias_table"}
    return endings.get(type(config.vision_cfg), "")


def _text_positions(config: ModelConfig) -> str:
    bert = isinstance(config.text_cfg, BertConfig)
    return "text.bert.embeddings.position_embeddings.weight" if bert else "text.positional_embedding"


def _with_own_sizes(config: ModelConfig, checkpoint: Checkpoint, name: str | None) -> ModelConfig:
    """The configuration with the picture's size and the texts' length that a checkpoint's position embeddings have.

    What it says otherwise would be wrong: interpolated positions are those of no training. All other sizes must be the
    configuration's (`_load`), and heads leave no trace in the weights.
    """
    own: dict[str, int] = {}
    image, text = config.vision_cfg, config.text_cfg
    rows = _rows(config, checkpoint, _text_positions(config))
    if isinstance(text, BertConfig):
        if rows is not None:
            config = replace(config, text_cfg=replace(text, max_positions=rows))
            own["context_length"] = min(text.context_length, rows)
    elif rows is not None:
        own["context_length"] = rows
    if isinstance(image, ViTConfig | ResNetConfig):
        step = image.patch_size if isinstance(image, ViTConfig) else _RESNET_STRIDE
        rows = _rows(config, checkpoint, _image_positions(config))
        side = 0 if rows is None else math.isqrt(rows - 1)
        if side and side**2 + 1 == rows and side != image.image_size // step:
            own["image_size"] = side * step
    said = {"context_length": text.context_length, "image_size": image.image_size}
    if other := {size: value for size, value in own.items() if value != said[size]}:
        told = " and ".join(f"{size} {value} in place of {said[size]}" for size, value in other.items())
        logger.warning("%s has %s, which %s says", checkpoint.path, told, name or "its configuration")
        config = config.with_changes(**other)
    return config


def _rows(config: ModelConfig, checkpoint: Checkpoint, name: str) -> int | None:
    """Places of a position embedding; None where the checkpoint has none, which is found later."""
    tensor = checkpoint.tensors.get(map_names([name], config, checkpoint.form)[0].theirs[0])
    return tensor.shape[-2] if tensor is not None and tensor.dim() >= 2 and tensor.shape[-2] > 1 else None


def _load(model: DualEncoder, checkpoint: Checkpoint, name: str, *, may_miss: set[str], resized: set[str]) -> None:
    """Fill `model` from a checkpoint that fits it whole; position embeddings whose names end as told are resized."""
    assert model.config is not None
    state = model.state_dict()
    mapped = map_names(state, model.config, checkpoint.form)
    known = {theirs for m in mapped for theirs in m.theirs}
    missing = [t for m in mapped if m.ours not in may_miss for t in m.theirs if t not in checkpoint.tensors]
    unexpected = [t for t in checkpoint.tensors if t not in known]
    tensors, shapes = _fit(model, state, checkpoint, mapped, tuple(resized - {""}))
    if told := misfit(missing, unexpected, shapes):
        raise ValueError(f"the checkpoint {checkpoint.path} does not fit {name}: {told}")
    model.load_state_dict(tensors, strict=not may_miss)


def misfit(missing: list[str], unexpected: list[str], shapes: list[str]) -> str:
    """Names of parameters that do not fit, in words; "" for none."""
    found = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    return "; ".join(_list(kind, names) for kind, names in found.items() if names)


def _list(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{more}"


def _fit(
    model: DualEncoder, state: dict[str, Tensor], checkpoint: Checkpoint, mapped: list[Mapped], resized: tuple[str, ...]
) -> tuple[dict[str, Tensor], list[str]]:
    """Their tensors under our names, the `resized` ones interpolated; and those of another shape, in words."""
    theirs = checkpoint.tensors
    tensors, shapes = {}, []
    for m in mapped:
        parts, wanted = [theirs[name] for name in m.theirs if name in theirs], state[m.ours].shape
        if len(parts) < len(m.theirs):
            continue  # missing
        try:
            tensor: Tensor | None = m.layout.read(parts)
        except (RuntimeError, IndexError):  # a shape that the layout cannot come from
            tensor = None
        if tensor is not None and tensor.shape != wanted:
            other = _resize(model, m.ours, tensor, wanted) if m.ours.endswith(resized) else None
            if other is not None:
                logger.warning("%s interpolated from %s to %s", m.ours, tuple(tensor.shape), tuple(wanted))
            tensor = other
        if tensor is None:
            found = ", ".join(f"{name} {tuple(part.shape)}" for name, part in zip(m.theirs, parts))
            shapes.append(f"{found} for {tuple(wanted)}")
        else:
            _check_numbers(m, tensor, state[m.ours].dtype, checkpoint.path)
            tensors[m.ours] = tensor
    return tensors, shapes


def _check_numbers(m: Mapped, tensor: Tensor, wanted: torch.dtype, path: Path) -> None:
    """Refuse what would be converted without a word: quantised, whole or complex numbers as weights, NaN, infinity."""
    names = ", ".join(m.theirs)
    if tensor.is_complex() or (wanted.is_floating_point and tensor.dtype not in _FLOATS):
        raise ValueError(f"{path}: {names} is {tensor.dtype}, and weights are one of {', '.join(map(str, _FLOATS))}")
    if tensor.numel() and not all(x.isfinite() for x in tensor.aminmax()):
        raise ValueError(f"{path}: {names} holds NaN or infinity, as after a training that diverged")


def _resize(model: DualEncoder, name: str, tensor: Tensor, wanted: torch.Size) -> Tensor | None:
    """A position embedding for another resolution or length; None for anything else."""
    from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table

    if tensor.dim() != len(wanted) or tensor.shape[-1] != wanted[-1]:
        return None
    tensor = tensor.float()
    if name in ("visual.pos_embed", "visual.head.pos_embed"):  # (1 or none, class token and places, width)
        places, side = tensor.shape[-2] - 1, round((wanted[-2] - 1) ** 0.5)
        if round(places**0.5) ** 2 != places:
            return None
        flat = tensor.reshape(1, -1, wanted[-1])
        return resample_abs_pos_embed(flat, [side, side], num_prefix_tokens=1).reshape(wanted)
    if name.endswith("relative_position_bias_table"):
        window = model.visual.get_submodule(name.removeprefix("visual.").rpartition(".")[0]).window_size
        return resize_rel_pos_bias_table(tensor, new_window_size=window, new_bias_shape=tuple(wanted))
    if name == "text.positional_embedding":
        return F.interpolate(tensor.T[None], size=wanted[0], mode="linear", align_corners=False)[0].T
    return None
