"""Pictures and captions as they lie in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps

__all__ = ["PICTURE_SUFFIXES", "json_captions", "read_picture", "text_captions"]

PICTURE_SUFFIXES = frozenset(
    (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)


def read_picture(file: Path | BinaryIO, key: str, *, min_side: int | None = None) -> Image.Image:
    """The picture, of any mode, all its pixels read and turned upright as its EXIF data say.

    Args:
        min_side: a JPEG at least twice, four or eight times as large may be decoded at a half, a quarter or an eighth
            of its size, with a shorter side of no less than this. Its decoder then computes fewer pixels.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it holds no picture, or a damaged one; the message names `key`.
    """
    if isinstance(file, Path):
        try:
            with file.open("rb") as opened:
                return read_picture(opened, key, min_side=min_side)
        except OSError as error:
            raise OSError(f"{key}: {error.strerror}") from error
    try:
        with Image.open(file) as image:
            if min_side is not None and image.format == "JPEG":
                image.draft(None, (min_side, min_side))
            image.load()  # a file that ends too early is found here
            ImageOps.exif_transpose(image, in_place=True)
            return image
    except Exception as error:  # Pillow's readers raise what their parsers happen to meet, struct.error for instance
        # Pillow shows the file object, of which a reader knows nothing
        reason = "its format is not known" if "cannot identify" in str(error) else str(error)
        raise ValueError(f"{key}: not a picture that can be read: {reason}") from error


def text_captions(data: bytes, key: str, *, lines: bool) -> tuple[str, ...]:
    """Captions of a text file in UTF-8: one a line, or one in all; without white space at their ends.

    Raises ValueError that names `key` when there is none.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{key}: its caption is not UTF-8: {error}") from error
    return _given(text.splitlines() if lines else [text], key)


def json_captions(data: bytes, key: str) -> tuple[str, ...]:
    """Captions of a JSON object with "caption": a string, as img2dataset writes it, or a list of strings.

    Raises ValueError that names `key` when there is none.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key}: its caption file is not JSON: {error}") from error
    caption = found.get("caption") if isinstance(found, dict) else None
    captions = caption if isinstance(caption, list) else [caption or ""]
    if not all(isinstance(text, str) for text in captions):
        raise ValueError(f'{key}: "caption" in its JSON file must be a string or a list of strings, is {caption!r}')
    return _given(captions, key)


def _given(captions: list[str], key: str) -> tuple[str, ...]:
    given = tuple(text for text in map(str.strip, captions) if text)
    if not given:
        raise ValueError(f"{key}: its caption is empty")
    return given
