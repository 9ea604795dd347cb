"""Model configurations: one small JSON file per model in the folder ``configs``, to be copied and changed.

The keys are open_clip's (``embed_dim``, ``vision_cfg``, ``text_cfg``, ``quick_gelu`` ...), so that open_clip's files
for ResNets and ViTs can be read unchanged. Keys without a counterpart in open_clip (``tower``, ``train_cfg``, the
options of CoSwin and BERT) are defined here.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cache
from numbers import Real
from pathlib import Path
from reprlib import repr as shown
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from fastclip.system.reading import read_json

__all__ = [
    "BertConfig",
    "CLIPTextConfig",
    "CoSwinConfig",
    "EfficientNetConfig",
    "ModelConfig",
    "OPEN_CLIP_PREPROCESS",
    "PreprocessConfig",
    "ResNetConfig",
    "TrainConfig",
    "ViTConfig",
    "config_path",
    "list_models",
    "load_config",
    "mapping",
]

logger = logging.getLogger(__name__)
FOLDER = Path(__file__).parent / "configs"
_CHOICES = {
    "interpolation": ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"),
    "resize_mode": ("shortest", "squash"),
    "train_crop": ("resized", "flipped"),
}
OPEN_CLIP_PREPROCESS = ("mean", "std", "interpolation", "resize_mode")  # fields of PreprocessConfig that open_clip has
_CHANGES = {"image_size": int, "context_length": int, "init_logit_scale": float, "init_logit_bias": float}
_T = TypeVar("_T")


@dataclass(frozen=True)
class ViTConfig:
    """Vision Transformer with a LayerNorm in front of its blocks (Radford et al. 2021)."""

    layers: int
    width: int
    patch_size: int  # pixels
    image_size: int = 224  # side of the square input, in pixels
    head_width: int = 64
    mlp_ratio: float = 4.0
    drop_path: float = 0.0  # stochastic depth: rate of the last block; the rates rise linearly from 0
    tower: str = "vit"


@dataclass(frozen=True)
class ResNetConfig:
    """ResNet with a stem of three convolutions, anti-aliased strides and attention pooling (Radford et al. 2021)."""

    layers: tuple[int, ...]  # bottleneck blocks per stage
    width: int  # channels of the stem; the last stage has 32 times as many
    image_size: int = 224
    head_width: int = 64
    tower: str = "resnet"


@dataclass(frozen=True)
class EfficientNetConfig:
    """EfficientNet from timm without the 1 x 1 convolution of its head (Jia et al. 2021)."""

    timm_model_name: str
    image_size: int
    drop_path: float = 0.0
    # Numbers of the blocks whose strided convolution pads both sides equally; the other strided blocks pad one pixel
    # less on the left and at the top. This is how Hugging Face's AlignModel pads. None means TensorFlow's "same"
    # padding, which depends on the size of each input.
    depthwise_padding: tuple[int, ...] | None = None
    tower: str = "efficientnet"


@dataclass(frozen=True)
class CoSwinConfig:
    """Swin Transformer with convolutions in place of patch embedding and patch merging (Yuan et al. 2021)."""

    layers: tuple[int, ...]  # blocks per stage
    width: int  # channels of the first stage; each further stage doubles them
    image_size: int = 224
    head_width: int = 32
    window_size: int = 7
    drop_path: float = 0.0
    tower: str = "coswin"


@dataclass(frozen=True)
class CLIPTextConfig:
    """CLIP's causal Transformer, fed by its byte-pair tokenizer (Radford et al. 2021)."""

    width: int
    heads: int
    layers: int
    context_length: int = 77  # tokens
    vocab_size: int = 49408
    tower: str = "clip"


@dataclass(frozen=True)
class BertConfig:
    """BERT, fed by a WordPiece tokenizer; the output at [CLS] represents the text (Jia et al. 2021)."""

    width: int
    heads: int
    layers: int
    vocabulary: str  # file next to the configuration, or a name in Hugging Face's cache
    vocab_size: int = 30522
    context_length: int = 64  # tokens per text
    max_positions: int = 512  # rows of the position embedding
    dropout: float = 0.1
    tower: str = "bert"


@dataclass(frozen=True)
class PreprocessConfig:
    """Options of the transform from an image to the image tower's input; the defaults are CLIP's and open_clip's."""

    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # per channel, for values from 0 to 1
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: str = "bicubic"
    resize_size: int | None = None  # pixels before the centre crop; None means the image size
    resize_mode: str = "shortest"  # "shortest" resizes the shorter side to resize_size, "squash" both sides
    # "resized": a random part of 90 to 100 % of the area; "flipped": a random crop, mirrored with probability 1/2
    train_crop: str = "resized"


@dataclass(frozen=True)
class TrainConfig:
    """Training options of the model's authors; the defaults are CLIP's."""

    loss: str = "clip"
    label_smoothing: float = 0.0
    optimizer: str = "adamw"
    weight_decay: float = 0.2
    learning_rate: float = 5e-4


@dataclass(frozen=True)
class ModelConfig:
    """Configuration of an image-text model: the contents of its JSON file."""

    embed_dim: int  # D, the length of a feature vector
    vision_cfg: ViTConfig | ResNetConfig | EfficientNetConfig | CoSwinConfig
    text_cfg: CLIPTextConfig | BertConfig
    quick_gelu: bool = False  # x sigmoid(1.702 x) in place of GELU, as OpenAI's weights need
    init_logit_scale: float = math.log(1 / 0.07)  # natural logarithm of the initial scale
    init_logit_bias: float | None = None  # for the sigmoid loss (SigLIP: -10)
    preprocess_cfg: PreprocessConfig = field(default_factory=PreprocessConfig)
    train_cfg: TrainConfig = field(default_factory=TrainConfig)
    comment: str = ""
    folder: Path | None = field(default=None, compare=False)  # folder of the JSON file; files that it names are there

    def with_changes(self, **options: float | None) -> ModelConfig:
        """Return a copy of this configuration with the given options replaced.

        Args:
            **options: ``image_size``, ``context_length``, ``init_logit_scale`` and ``init_logit_bias``, as in
                `create_model`. Options that are None keep the configuration's value.

        Raises:
            ValueError: a value is outside of the range that models support.
        """
        changes = {
            name: _checked(name, value, _CHANGES[name], name) for name, value in options.items() if value is not None
        }
        side, length = changes.pop("image_size", None), changes.pop("context_length", None)
        if side is not None:
            changes["vision_cfg"] = replace(self.vision_cfg, image_size=side)
            if (resized := self.preprocess_cfg.resize_size) is not None:  # keeps resize_size / image_size
                resized = round(resized * side / self.vision_cfg.image_size)
                changes["preprocess_cfg"] = replace(self.preprocess_cfg, resize_size=resized)
        if length is not None:
            changes["text_cfg"] = replace(self.text_cfg, context_length=length)
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of the configuration file as a dictionary."""
        values = asdict(self)
        del values["folder"]  # meaningful on this machine only
        return {name: value for name, value in values.items() if value not in (None, "")}

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, where: str, folder: Path | None = None) -> ModelConfig:
        """Build a configuration from the contents of its file, the inverse of `to_dict`.

        Args:
            values: contents of the file.
            where: name of the source in error messages.
            folder: folder of the file, in which a vocabulary is looked for.

        Raises:
            ValueError: a key is unknown or missing, a value has the wrong type, or the sizes do not fit together.
        """
        values = {**values, "folder": folder}
        for name, kinds in (("vision_cfg", _VISION), ("text_cfg", _TEXT)):
            part = mapping(values.get(name, {}), f"{where}: {name}")
            kind = part.get("tower") or ("resnet" if isinstance(part.get("layers"), list) else next(iter(kinds)))
            if not isinstance(kind, str) or kind not in kinds:
                raise ValueError(f"{where}: {name}: tower must be one of {sorted(kinds)}, got {shown(kind)}")
            values[name] = _build(kinds[kind], part, f"{where}: {name}")
        values["preprocess_cfg"] = _build(
            PreprocessConfig, values.get("preprocess_cfg", {}), f"{where}: preprocess_cfg"
        )
        values["train_cfg"] = _build(TrainConfig, values.get("train_cfg", {}), f"{where}: train_cfg")
        config = _build(cls, values, where)
        side, resized = config.vision_cfg.image_size, config.preprocess_cfg.resize_size
        if resized is not None and resized < side:
            raise ValueError(f"{where}: resize_size must be at least image_size {side}, got {resized}")
        return config


_VISION = {"vit": ViTConfig, "resnet": ResNetConfig, "efficientnet": EfficientNetConfig, "coswin": CoSwinConfig}
_TEXT = {"clip": CLIPTextConfig, "bert": BertConfig}


@cache
def _names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in FOLDER.glob("*.json")))


def list_models() -> list[str]:
    """Return the sorted names of all models that `create_model` can build."""
    return list(_names())


def config_path(name: str | Path) -> Path:
    """Return the path of a model's configuration file.

    Args:
        name: model name from `list_models`, or path of a configuration ending in ``.json``. OpenAI's spelling with a
            slash (``ViT-B/32``) is accepted and logged once. Other spellings are not guessed.

    Raises:
        ValueError: no model has this name.
        FileNotFoundError: the path does not exist.
    """
    name = str(name)
    if name.endswith(".json"):
        path = Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"the configuration {name} does not exist")
        return path
    known, plain = _names(), name.replace("/", "-")
    if plain not in known:  # compared with the list: a case-insensitive file system would find vit-b-32.json as well
        raise ValueError(
            f"no model is called {name!r}: {_advice(name, known)} To use your own configuration, pass a path that ends "
            "in .json"
        )
    if plain != name:
        _warn_of_spelling(name, plain, f"{plain}-quickgelu" in known)
    return FOLDER / f"{plain}.json"


@cache  # logs each spelling once
def _warn_of_spelling(name: str, plain: str, has_quickgelu: bool) -> None:
    activation = ""
    if has_quickgelu:
        activation = (
            ", whose activation is GELU; an OpenAI checkpoint selects QuickGELU by itself, but other weights "
            f"trained with QuickGELU need {plain}-quickgelu"
        )
    logger.warning("model %r is interpreted as %s%s", name, plain, activation)


def _advice(name: str, known: Sequence[str]) -> str:
    if name.startswith("local-dir:"):
        return f"pass the folder {name.removeprefix('local-dir:')} as the checkpoint, not as the name of a model."
    if name.startswith(("hf-hub:", "hf_hub:")) or (name.count("/") == 1 and not name.lower().startswith(("vit", "rn"))):
        return "download it from the Hugging Face Hub with `hf download`, and pass that folder as the checkpoint."
    plain = {re.sub(r"[^a-z0-9]", "", other.lower()): other for other in known}
    same = plain.get(re.sub(r"[^a-z0-9]", "", name.lower()))
    close = [same] if same else difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else "see fastclip.list_models()."


def load_config(name: str | Path) -> ModelConfig:
    """Read the configuration of a model, given by its name or by the path of a JSON file.

    Raises:
        ValueError: the name is unknown, or the file is not a valid configuration (`ModelConfig.from_dict`).
        FileNotFoundError: the path does not exist.
    """
    path = config_path(name)
    values = read_json(path)
    if values.get("model_type") == "fastclip":  # written by `save_pretrained`
        del values["model_type"]
    return ModelConfig.from_dict(values, where=str(path), folder=path.parent)


def mapping(values: Any, where: str) -> dict[str, Any]:
    """Return `values` if it is a dictionary, and raise a ValueError that names `where` otherwise."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be an object of names and values, got {shown(values)}")
    return values


def _build(cls: type[_T], values: dict[str, Any], where: str) -> _T:
    """Build a dataclass from `values`; None (JSON's null) selects a field's default."""
    values = {name: value for name, value in mapping(values, where).items() if value is not None}
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(
            f"{where}: unknown keys: {', '.join(unknown)}; known keys: {', '.join(sorted(set(known) - {'folder'}))}"
        )
    missing = [f.name for f in known.values() if f.default is f.default_factory is MISSING and f.name not in values]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} must be given")
    return cls(**{name: _checked(name, value, hints[name], f"{where}: {name}") for name, value in values.items()})


def _checked(name: str, value: Any, hint: Any, where: str) -> Any:
    """Return the value of a field, converted to its type hint and checked against the field's range.

    Without this check, an impossible number would end in an obscure error of torch or exhaust the memory.

    Raises:
        ValueError: the value has the wrong type or is out of range; the message begins with `where`.
    """
    value = _typed(value, hint, where)
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            raise ValueError(f"{where} must be a finite number, got {number}")
        if type(number) is int:  # excludes bool
            least, most = (0 if name == "depthwise_padding" else 1), (1000 if name == "layers" else 1_000_000)
            if not least <= number <= most:
                raise ValueError(f"{where} must be between {least} and {most:,}, got {number}")
    if name in ("drop_path", "dropout", "label_smoothing") and not 0 <= value < 1:
        raise ValueError(f"{where} must be at least 0 and less than 1, got {value}")
    if name == "mlp_ratio" and not 0 < value <= 100:
        raise ValueError(f"{where} must be above 0 and at most 100, got {value}")
    if name in ("mean", "std") and (len(value) != 3 or (name == "std" and min(value) <= 0)):
        wanted = "three positive numbers" if name == "std" else "three numbers"
        raise ValueError(f"{where} must be {wanted}, got {value}")
    if name == "vocabulary" and (not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value) or ".." in value):
        raise ValueError(
            f"{where} must be a file next to the configuration or a name in Hugging Face's cache, got {value!r}"
        )
    if name in _CHOICES and value not in _CHOICES[name]:
        raise ValueError(f"{where} must be one of {', '.join(_CHOICES[name])}, got {shown(value)}")
    return value


def _typed(value: Any, hint: Any, where: str) -> Any:
    """Return `value` as the type of `hint`: a list becomes a tuple, an integer or numpy float becomes a float."""
    kinds = [kind for kind in (hint, *get_args(hint)) if kind is not type(None)]
    if tuples := [kind for kind in kinds if get_origin(kind) is tuple]:
        element = get_args(tuples[0])[0]
        if isinstance(value, list | tuple) and all(isinstance(x, element | int) for x in value):
            return tuple(element(x) for x in value)
        raise ValueError(f"{where} must be a list of {element.__name__}, got {shown(value)}")
    if float in kinds and isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    plain = tuple(kind for kind in kinds if isinstance(kind, type))  # a union such as int | None is not a type
    if not isinstance(value, plain) or (isinstance(value, bool) and bool not in plain):
        raise ValueError(f"{where} must be {' or '.join(kind.__name__ for kind in plain)}, got {shown(value)}")
    return value
