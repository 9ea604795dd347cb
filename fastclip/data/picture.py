"""Read images from files, and limit their size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fastclip.data.faults import BadSample
from fastclip.data.files import open_file
from fastclip.data.pillow_warnings import quietly

__all__ = [
    "PICTURE_SUFFIXES",
    "USUAL_PIXELS",
    "drawn",
    "eight_bits",
    "is_drawn",
    "limit_in_words",
    "limit_pixels",
    "older_limit",
    "picture_formats",
    "pixels_limited",
    "read_picture",
]

USUAL_PIXELS = 1024**3 // 4 // 3  # Pillow's default limit for the pixels of one image
_SOFTWARE = 0x131  # number of the EXIF field "Software"
_HEIF = find_spec("pillow_heif") is not None
# HEIF's suffixes are listed even without pillow-heif: such an image is then counted as unreadable, not ignored.
PICTURE_SUFFIXES = frozenset(
    (".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".hif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg")
) | frozenset((".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"))
# A file is read as one of these formats, whatever its suffix. Pillow's other formats start a program (EPS) or are rare.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "PPM", "MPO", "AVIF", "JPEG2000", "ICO", "TGA", "HEIF")


def read_picture(file: Path | BinaryIO, key: str, *, min_side: int | None = None) -> Image.Image:
    """Read and completely decode an image, and turn it upright according to its EXIF data.

    The image has the mode of its file, and ``convert("RGB")`` is left to the caller. That conversion drops
    transparency, as in open_clip. The transparency of a palette with an alpha value per colour is already dropped by
    this function. An animation gives its first frame.

    Modes of more than 8 bits become L, because Pillow's conversion would clip values above 255. The range from 0 to a
    maximum is scaled to 0 to 255. The maximum is 65,535 for 16-bit images. For other integer and float images it is the
    smallest of 1 (floats only), 255, 65,535 and 2^31 that no value exceeds.

    An image of more than Pillow's ``Image.MAX_IMAGE_PIXELS`` (89 million) is refused before it is decoded.
    `limit_pixels` sets another limit. A pipe or a device is refused too.

    Args:
        min_side: the least length in pixels that the shorter side must keep. A JPEG at least twice, four or eight
            times as large may then be decoded at a half, a quarter or an eighth of its size, which saves decoding time.

    Raises:
        BadSample: the file cannot be opened or is not an image, or the image is damaged or too large. The text names
            `key`.
    """
    if isinstance(file, Path):
        try:
            opened = open_file(file)
        except (OSError, ValueError) as error:  # ValueError: a name that holds a NUL character
            cause = "missing file" if isinstance(error, FileNotFoundError) else "unreadable file"
            raise BadSample(cause, key, getattr(error, "strerror", None) or str(error)) from error
        with opened:
            return read_picture(opened, key, min_side=min_side)
    try:
        with quietly(), Image.open(file, formats=picture_formats()) as image:
            if min_side is not None and image.format == "JPEG":
                image.draft(None, (min_side, min_side))
            image.load()  # decodes the pixels, and raises for a truncated file
            with suppress(Exception):  # damaged EXIF data raise many kinds of errors; the image is still usable
                ImageOps.exif_transpose(image, in_place=True)
            if isinstance(image.info.get("transparency"), bytes):  # one alpha value per palette colour
                del image.info["transparency"]  # convert("RGB") would drop it with a warning
            return eight_bits(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        what = f"the image is too large (raise --max-pixels to read it): {error}"
        raise BadSample("image too large", key, what) from error
    except UnidentifiedImageError as error:  # Pillow's text shows the repr of the file object, which names no file
        what = f"not a readable image: {_unknown(file)}"
        raise BadSample("not an image", key, what) from error
    except MemoryError:  # the machine's fault, not the image's
        raise
    except Exception as error:  # Pillow's decoders let the errors of their parsers through, such as struct.error
        cause = "truncated image" if "truncated" in str(error).lower() else "damaged image"
        if isinstance(error, OSError) and error.errno is not None:  # from the operating system, not from Pillow
            cause = "unreadable file"
        raise BadSample(cause, key, f"not a readable image: {error}") from error


def limit_pixels(pixels: int) -> None:
    """Refuse images of more than `pixels` pixels from now on, in this process and in the processes that it forks.

    Raises ValueError if `pixels` is not positive.
    """
    if pixels < 1:
        raise ValueError(f"the largest number of pixels must be at least 1, got {pixels}")
    Image.MAX_IMAGE_PIXELS = pixels


def older_limit(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options `about` that a file has stored, with Pillow's limit as "max_pixels" if they lack that key.

    Files of early versions do not store the limit, which could not be changed then.
    """
    return {"max_pixels": USUAL_PIXELS, **about}


def limit_in_words() -> str:
    """Return the limit of pixels as a text for the keys of caches of results; "" for Pillow's default limit."""
    return "" if Image.MAX_IMAGE_PIXELS == USUAL_PIXELS else f"{Image.MAX_IMAGE_PIXELS} pixels"


@contextmanager
def pixels_limited(pixels: int | None) -> Iterator[None]:
    """Limit images to `pixels` inside the context and restore the former limit afterwards; None changes nothing."""
    before = Image.MAX_IMAGE_PIXELS
    if pixels is not None:
        limit_pixels(pixels)
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def drawn() -> Image.Exif:
    """Return EXIF data that mark an image as drawn by fastclip, so that `is_drawn` recognises the file.

    Use as ``image.save(file, exif=drawn())``.
    """
    exif = Image.Exif()
    exif[_SOFTWARE] = "fastclip"
    return exif


def is_drawn(file: Path) -> bool:
    """Return True if fastclip has drawn the image, so that it may be overwritten; False if it cannot be read."""
    try:
        with Image.open(file, formats=("PNG", "JPEG", "WEBP")) as picture:
            return bool(picture.getexif().get(_SOFTWARE) == "fastclip")
    except Exception:  # Pillow raises many kinds of errors for damaged images
        return False


def _unknown(file: BinaryIO) -> str:
    """Return the reason why the format of a file is not recognised, for a message."""
    file.seek(0)
    head = file.read(32)
    if not head:
        return "the file is empty"
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc") and not _HEIF:
        return "HEIF needs pillow-heif, which is not installed"
    return "its format is not recognised"


@cache
def picture_formats() -> tuple[str, ...]:
    """Return the formats that Pillow may recognise a file as. None of these starts another program."""
    Image.init()
    if _HEIF:
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in _FORMATS if name in Image.OPEN)  # a build of Pillow may lack some formats


def eight_bits(image: Image.Image) -> Image.Image:
    """Return an image of more than 8 bits per channel as L, scaled as `read_picture` describes; any other unchanged."""
    if image.mode[0] not in "IF":
        return image
    pixels = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0, neginf=0)
    if image.mode.startswith("I;16"):
        top = 65535.0
    else:
        largest = pixels.max(initial=0)
        top = next((top for top in (1.0, 255.0, 65535.0) if largest <= top and (top > 1 or image.mode == "F")), 2.0**31)
    return Image.fromarray((pixels.clip(0, top) * (255 / top)).round().astype(np.uint8))
