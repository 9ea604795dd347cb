"""Pictures and captions as they lie in files."""

from __future__ import annotations

import json
import warnings
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fastclip.data.faults import BadSample

__all__ = ["PICTURE_SUFFIXES", "json_captions", "json_fields", "read_picture", "text_captions"]

_HEIF = find_spec("pillow_heif") is not None
PICTURE_SUFFIXES = frozenset(
    (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
) | frozenset((".heic", ".heif") if _HEIF else ())
# What a file is read as, whatever its name says. Others that Pillow knows start a program (EPS) or are rare.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "PPM", "MPO", "AVIF", "JPEG2000", "ICO", "TGA", "HEIF")


def read_picture(file: Path | BinaryIO, key: str, *, min_side: int | None = None) -> Image.Image:
    """The picture, all its pixels read and turned upright as its EXIF data say; of an animation the first.

    Its mode is the file's, which ``convert("RGB")`` turns into colours: transparency is dropped, as open_clip does. The
    modes of more than 8 bits, of which Pillow would cut off what is above 255, become L here: 16 bits are scaled to 8,
    other whole numbers and floats by the smallest of 1 (floats), 255, 65,535 and 2^31 - 1 that holds the largest.

    A picture of more than Pillow's ``Image.MAX_IMAGE_PIXELS``, 89 million, is refused from its header.

    Args:
        min_side: a JPEG at least twice, four or eight times as large may be decoded at a half, a quarter or an eighth
            of its size, with a shorter side of no less than this. Its decoder then computes fewer pixels.

    Raises:
        BadSample: the file cannot be opened, or holds no picture, or one that is damaged or too large; with `key`.
    """
    if isinstance(file, Path):
        try:
            opened = file.open("rb")
        except (OSError, ValueError) as error:  # ValueError: a name that holds a zero
            cause = "missing file" if isinstance(error, FileNotFoundError) else "unreadable file"
            raise BadSample(cause, key, getattr(error, "strerror", None) or str(error)) from error
        with opened:
            return read_picture(opened, key, min_side=min_side)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata, a line on stderr for each
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=_formats()) as image:
                if min_side is not None and image.format == "JPEG":
                    image.draft(None, (min_side, min_side))
                image.load()  # a file that ends too early is found here
                with suppress(Exception):  # EXIF data may be damaged in as many ways as pictures
                    ImageOps.exif_transpose(image, in_place=True)
                return _eight_bits(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample("image too large", key, f"the image is too large: {error}") from error
    except UnidentifiedImageError as error:  # its text shows the file object, of which a reader knows nothing
        raise BadSample("not an image", key, "not a picture that can be read: its format is not known") from error
    except MemoryError:  # the machine's fault, not the picture's
        raise
    except Exception as error:  # Pillow's readers raise what their parsers happen to meet, struct.error for instance
        cause = "truncated image" if "truncated" in str(error).lower() else "damaged image"
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not Pillow's
            cause = "unreadable file"
        raise BadSample(cause, key, f"not a picture that can be read: {error}") from error


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    if _HEIF:
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in _FORMATS if name in Image.OPEN)  # a build of Pillow may lack some


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode[0] not in "IF":
        return image
    pixels = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0, neginf=0)
    if image.mode.startswith("I;16"):
        top = 65535.0
    else:
        largest = pixels.max(initial=0)
        top = next((top for top in (1.0, 255.0, 65535.0) if largest <= top and (top > 1 or image.mode == "F")), 2.0**31)
    return Image.fromarray((pixels.clip(0, top) * (255 / top)).round().astype(np.uint8))


def text_captions(data: bytes, key: str, *, lines: bool) -> tuple[str, ...]:
    """Captions of a text file in UTF-8: one a line, or one in all; without white space at their ends.

    Raises BadSample with `key` when there is none.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("damaged caption", key, f"its caption is not UTF-8: {error}") from error
    return _given(text.splitlines() if lines else [text], key)


def json_captions(data: bytes, key: str) -> tuple[str, ...]:
    """Captions of a JSON object with "caption": a string, as img2dataset writes it, or a list of strings.

    Raises BadSample with `key` when there is none.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("damaged caption", key, f"its caption file is not JSON: {error}") from error
    caption = found.get("caption") if isinstance(found, dict) else None
    captions = caption if isinstance(caption, list) else [caption or ""]
    if not all(isinstance(text, str) for text in captions):
        what = f'"caption" in its JSON file must be a string or a list of strings, is {caption!r}'
        raise BadSample("damaged caption", key, what)
    return _given(captions, key)


def json_fields(data: bytes) -> dict[str, Any]:
    """Of a JSON object all but "caption"; nothing of what is none."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return {name: value for name, value in found.items() if name != "caption"} if isinstance(found, dict) else {}


def _given(captions: list[str], key: str) -> tuple[str, ...]:
    given = tuple(text for text in map(str.strip, captions) if text)
    if not given:
        raise BadSample("empty caption", key, "its caption is empty")
    return given
