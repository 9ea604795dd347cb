"""Read pictures from files."""

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

USUAL_PIXELS = 1024**3 // 4 // 3  # of the largest picture that is read, as Pillow has it
_SOFTWARE = 0x131  # the number of EXIF's field
_HEIF = find_spec("pillow_heif") is not None
# Those of HEIF too where pillow-heif is not installed: such a picture is counted as one that cannot be read
PICTURE_SUFFIXES = frozenset(
    (".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".hif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg")
) | frozenset((".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"))
# What a file is read as, whatever its name says. Others that Pillow knows start a program (EPS) or are rare.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "PPM", "MPO", "AVIF", "JPEG2000", "ICO", "TGA", "HEIF")


def read_picture(file: Path | BinaryIO, key: str, *, min_side: int | None = None) -> Image.Image:
    """Return the picture, all its pixels read and turned upright as its EXIF data say; of an animation the first.

    Its mode is the file's, which ``convert("RGB")`` turns into colours: transparency is dropped, as open_clip does, and
    here already where each colour of a palette has its own. The modes of more than 8 bits, of which Pillow would cut
    off what is above 255, become L here: 16 bits are scaled to 8, other whole numbers and floats by the smallest of 1
    (floats), 255, 65,535 and 2^31 - 1 that holds the largest.

    A picture of more than Pillow's ``Image.MAX_IMAGE_PIXELS``, 89 million, is refused from its header; `limit_pixels`
    sets another limit. A pipe or a device is no picture.

    Args:
        min_side: a JPEG at least twice, four or eight times as large may be decoded at a half, a quarter or an eighth
            of its size, with a shorter side of no less than this. Its decoder then computes fewer pixels.

    Raises:
        BadSample: the file cannot be opened, or holds no picture, or one that is damaged or too large; with `key`.
    """
    if isinstance(file, Path):
        try:
            opened = open_file(file)
        except (OSError, ValueError) as error:  # ValueError: a name that holds a zero
            cause = "missing file" if isinstance(error, FileNotFoundError) else "unreadable file"
            raise BadSample(cause, key, getattr(error, "strerror", None) or str(error)) from error
        with opened:
            return read_picture(opened, key, min_side=min_side)
    try:
        with quietly(), Image.open(file, formats=picture_formats()) as image:
            if min_side is not None and image.format == "JPEG":
                image.draft(None, (min_side, min_side))
            image.load()  # a file that ends too early is found here
            with suppress(Exception):  # EXIF data may be damaged in as many ways as pictures
                ImageOps.exif_transpose(image, in_place=True)
            if isinstance(image.info.get("transparency"), bytes):  # of a palette
                del image.info["transparency"]  # of which convert("RGB") warns, and which it drops
            return eight_bits(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        what = f"the image is too large; --max-pixels allows more: {error}"
        raise BadSample("image too large", key, what) from error
    except UnidentifiedImageError as error:  # its text shows the file object, of which a reader knows nothing
        what = f"not a picture that can be read: {_unknown(file)}"
        raise BadSample("not an image", key, what) from error
    except MemoryError:  # the machine's fault, not the picture's
        raise
    except Exception as error:  # Pillow's readers raise what their parsers happen to meet, struct.error for instance
        cause = "truncated image" if "truncated" in str(error).lower() else "damaged image"
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not Pillow's
            cause = "unreadable file"
        raise BadSample(cause, key, f"not a picture that can be read: {error}") from error


def limit_pixels(pixels: int) -> None:
    """Refuse pictures of more pixels from now on, in this process and in those that it forks.

    Raises ValueError where `pixels` is not positive.
    """
    if pixels < 1:
        raise ValueError(f"the largest number of pixels must be at least 1, got {pixels}")
    Image.MAX_IMAGE_PIXELS = pixels


def older_limit(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file says of a call, with the limit of pixels that was the only one when files did not tell it."""
    return {"max_pixels": USUAL_PIXELS, **about}


def limit_in_words() -> str:
    """Return the limit of pixels in words, for keys of what was computed from pictures; "" for the usual limit."""
    return "" if Image.MAX_IMAGE_PIXELS == USUAL_PIXELS else f"{Image.MAX_IMAGE_PIXELS} pixels"


@contextmanager
def pixels_limited(pixels: int | None) -> Iterator[None]:
    """`limit_pixels` inside, unless it is None; afterwards the limit is as it was."""
    before = Image.MAX_IMAGE_PIXELS
    if pixels is not None:
        limit_pixels(pixels)
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def drawn() -> Image.Exif:
    """Return the EXIF data that mark a picture as drawn by a command: ``save(file, exif=drawn())``, for `is_drawn`."""
    exif = Image.Exif()
    exif[_SOFTWARE] = "fastclip"
    return exif


def is_drawn(file: Path) -> bool:
    """Return True if a command has drawn the picture, which may be drawn anew; False for all that cannot be read."""
    try:
        with Image.open(file, formats=("PNG", "JPEG", "WEBP")) as picture:
            return bool(picture.getexif().get(_SOFTWARE) == "fastclip")
    except Exception:  # Pillow's of damaged pictures are of many kinds
        return False


def _unknown(file: BinaryIO) -> str:
    """Return what a message can say about a file of no known format."""
    file.seek(0)
    head = file.read(32)
    if not head:
        return "it holds nothing"
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc") and not _HEIF:
        return "HEIF needs pillow-heif, which is not installed"
    return "its format is not known"


@cache
def picture_formats() -> tuple[str, ...]:
    """Return the formats that Pillow may take a file for; none of these starts a program."""
    Image.init()
    if _HEIF:
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in _FORMATS if name in Image.OPEN)  # a build of Pillow may lack some


def eight_bits(image: Image.Image) -> Image.Image:
    """Return a picture of more than 8 bits a channel as L, as `read_picture` describes; any other as it is."""
    if image.mode[0] not in "IF":
        return image
    pixels = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0, neginf=0)
    if image.mode.startswith("I;16"):
        top = 65535.0
    else:
        largest = pixels.max(initial=0)
        top = next((top for top in (1.0, 255.0, 65535.0) if largest <= top and (top > 1 or image.mode == "F")), 2.0**31)
    return Image.fromarray((pixels.clip(0, top) * (255 / top)).round().astype(np.uint8))
