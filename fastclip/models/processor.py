"""Read and write the image processors of Hugging Face models, and translate them to `PreprocessConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as shown
from typing import Any, NamedTuple

from fastclip.models.config import PreprocessConfig, mapping
from fastclip.system.durable import write_json
from fastclip.system.reading import read_json

__all__ = ["PROCESSOR_FILES", "ImageProcessor", "read_image_processor", "write_image_processor"]

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")  # the first that exists, as in transformers
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # PIL's numbers

# Values that transformers uses for missing keys: first those of all classes, then those of each class
_USUAL = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "resample": 3}
_SQUARE = {"height": 224, "width": 224}
_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_center_crop": False}
_CLIP = {
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "do_center_crop": True,
    "crop_size": _SQUARE,
    "image_mean": list(PreprocessConfig.mean),
    "image_std": list(PreprocessConfig.std),
}
_EFFICIENTNET = {
    "size": {"height": 346, "width": 346},
    "crop_size": {"height": 289, "width": 289},
    "rescale_offset": False,
    "include_top": True,
}
_KINDS: dict[str, dict[str, Any]] = {
    "BitImageProcessor": _CLIP,
    "CLIPImageProcessor": _CLIP,
    "EfficientNetImageProcessor": _HALF | _EFFICIENTNET,
    "SiglipImageProcessor": _HALF | {"size": _SQUARE, "default_to_square": False},
    "ViTImageProcessor": _HALF | {"size": _SQUARE, "resample": 2},
}
# Supported steps. Images are always converted to RGB, even if do_convert_rgb is false.
_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")


class ImageProcessor(NamedTuple):
    """A Hugging Face image processor, in terms of this package's preprocessing options."""

    mean: tuple[float, ...]  # per channel, for values from 0 to 1, as in `PreprocessConfig`
    std: tuple[float, ...]
    interpolation: str
    resize_size: int  # pixels
    resize_mode: str
    image_size: int  # side of the square output in pixels
    where: str  # the file that the processor was read from, for error messages

    def preprocess(self, train_crop: str) -> PreprocessConfig:
        """Convert the processor to the preprocessing options of a configuration."""
        side = self.resize_size if self.resize_size != self.image_size else None
        return PreprocessConfig(self.mean, self.std, self.interpolation, side, self.resize_mode, train_crop)


def read_image_processor(folder: Path, usual: str) -> ImageProcessor | None:
    """Read the image processor of a folder, from the file that transformers would read.

    Args:
        folder: folder of a Hugging Face model.
        usual: class to assume if the file does not name one, such as "CLIPImageProcessor".

    Returns:
        The processor, or None if the folder contains none.

    Raises:
        ValueError: the processor applies a step that `PreprocessConfig` cannot express. The message names the file and
            the key.
    """
    values, where = _read(folder)
    if values is None:
        return None
    values = {name: value for name, value in values.items() if value is not None or _is_flag(name)}
    kind = _kind(values, usual, where)
    for name, value in values.items():
        if value and ((name.startswith("do_") and name not in _STEPS) or name == "use_square_size"):
            raise ValueError(f"{where}: {name} must be false, as this step is not supported, got {shown(value)}")
    values = _USUAL | _KINDS[kind] | values
    mean, std = _normalisation(values, kind == "EfficientNetImageProcessor", where)
    if not _is_whole(values["resample"]) or values["resample"] not in _RESAMPLE:
        known = ", ".join(f"{number} ({name})" for number, name in _RESAMPLE.items())
        raise ValueError(f"{where}: resample must be one of {known}, got {shown(values['resample'])}")
    side, mode, crop = _sizes(values, where)
    return ImageProcessor(mean, std, _RESAMPLE[values["resample"]], side, mode, crop, where)


def write_image_processor(folder: Path, kind: str, options: PreprocessConfig, image_size: int) -> None:
    """Write the ``preprocessor_config.json`` that makes transformers prepare images in the same way as this package.

    Args:
        folder: folder to write the file into.
        kind: class of the processor, such as "CLIPImageProcessor".
        options: preprocessing options of the model.
        image_size: side of the square output in pixels.
    """
    side = options.resize_size or image_size
    values = {
        "image_processor_type": kind,
        "do_resize": True,
        "size": {"height": side, "width": side} if options.resize_mode == "squash" else {"shortest_edge": side},
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "resample": next(number for number, name in _RESAMPLE.items() if name == options.interpolation),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "rescale_offset": False,
        "do_normalize": True,
        "image_mean": list(options.mean),
        "image_std": list(options.std),
        "do_convert_rgb": True,
    }
    if kind == "EfficientNetImageProcessor":
        values["include_top"] = False  # otherwise transformers divides by image_std a second time
    write_json(folder / PROCESSOR_FILES[1], values)


def _read(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """Return the values of an image processor, and a text that says in messages where they were found.

    The image processor in ``processor_config.json`` takes precedence over ``preprocessor_config.json``.
    """
    whole, alone = (folder / name for name in PROCESSOR_FILES)
    if whole.is_file() and (values := read_json(whole).get("image_processor")) is not None:
        where = f"{whole}: image_processor"
        return mapping(values, where), where
    return (read_json(alone), str(alone)) if alone.is_file() else (None, "")


def _kind(values: Mapping[str, Any], usual: str, where: str) -> str:
    """Return the class of a processor without the suffixes that transformers 4 and 5 append to its name."""
    key = "image_processor_type" if "image_processor_type" in values else "feature_extractor_type"
    name = str(values.get(key, usual))
    kind = name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    if kind not in _KINDS:
        raise ValueError(f"{where}: {key} must be one of {', '.join(_KINDS)}, got {shown(name)}")
    return kind


def _normalisation(values: Mapping[str, Any], efficientnet: bool, where: str) -> tuple[tuple[float, ...], ...]:
    """Combine rescaling and normalisation, which are both linear, into one mean and std for channels from 0 to 1."""
    mean, std = (_channels(values, name, where) for name in ("image_mean", "image_std"))
    scale, shift = 255.0, 0.0  # the processor's input is scale * channel for a channel from 0 to 1
    if _flag(values, "do_rescale", where):
        factor = values["rescale_factor"]
        if not _is_number(factor) or not 1e-9 < factor < 1e6:
            raise ValueError(f"{where}: rescale_factor must be a positive number, got {shown(factor)}")
        scale = float(f"{255 * factor:.12g}")  # files contain 1/127.5 with 15 digits, so the product is rounded
        shift = float(efficientnet and _flag(values, "rescale_offset", where))
    last = std if efficientnet and _flag(values, "include_top", where) else (1.0, 1.0, 1.0)
    if not _flag(values, "do_normalize", where):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return tuple((shift + m) / scale for m in mean), tuple(s * t / scale for s, t in zip(std, last))


def _sizes(values: Mapping[str, Any], where: str) -> tuple[int, str, int]:
    """Return the size in pixels that images are resized to, the resize mode, and the side of the square output."""
    if not _flag(values, "do_resize", where):
        raise ValueError(f"{where}: do_resize must be true, because fastclip always resizes images")
    size = _edges(values["size"], values.get("default_to_square", True), "size", where)
    mode = "shortest" if size.keys() == {"shortest_edge"} else "squash"
    side = next(iter(size.values()), 0)
    if mode == "squash" and size != {"height": side, "width": side}:
        raise ValueError(
            f'{where}: size must be a number, {{"shortest_edge": N}} or {{"height": N, "width": N}}, '
            f"got {shown(values['size'])}"
        )
    if not _flag(values, "do_center_crop", where):
        if mode == "shortest":
            raise ValueError(
                f"{where}: do_center_crop must be true if size has shortest_edge, as all images become squares"
            )
        return side, mode, side
    crop = _edges(values.get("crop_size"), True, "crop_size", where)
    if crop != dict.fromkeys(("height", "width"), crop.get("height")):
        raise ValueError(
            f'{where}: crop_size must be a number or {{"height": N, "width": N}}, got {shown(values["crop_size"])}'
        )
    if crop["height"] > side:
        raise ValueError(f"{where}: crop_size {crop['height']} must be at most size, {side}: images are not padded")
    return side, mode, crop["height"]


def _edges(value: Any, square: Any, key: str, where: str) -> dict[str, int]:
    """Return a size as a dictionary from edge to pixels, given in any of the forms that transformers accepts."""
    if _is_whole(value):
        value = {"height": value, "width": value} if square else {"shortest_edge": value}
    elif isinstance(value, list) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    edges = {name: edge for name, edge in value.items() if edge is not None} if isinstance(value, dict) else {}
    if not edges or not all(_is_whole(edge) and 0 < edge <= 1_000_000 for edge in edges.values()):
        raise ValueError(f"{where}: {key} must contain positive whole numbers of pixels, got {shown(value)}")
    return edges


def _channels(values: Mapping[str, Any], name: str, where: str) -> tuple[float, ...]:
    numbers = values[name] if isinstance(values[name], list) else []
    least = 0 if name == "image_std" else -1e6
    if len(numbers) != 3 or not all(_is_number(number) and least < number < 1e6 for number in numbers):
        which = "three positive numbers" if least == 0 else "three numbers"
        raise ValueError(f"{where}: {name} must be {which}, got {shown(values[name])}")
    return tuple(map(float, numbers))


def _is_flag(name: str) -> bool:
    return name.startswith("do_") or name in ("rescale_offset", "include_top", "default_to_square")


def _flag(values: Mapping[str, Any], name: str, where: str) -> bool:
    """Return a flag; null counts as false, because transformers skips a step whose flag is null."""
    value = values[name] if values[name] is not None else False
    if not isinstance(value, bool):
        raise ValueError(f"{where}: {name} must be true or false, got {shown(value)}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
