"""Contact sheets of the matches of a query, and images as text for a terminal."""

from __future__ import annotations

import base64
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastclip.data.faults import BadSample
from fastclip.data.picture import read_picture
from fastclip.search.engine import Match

__all__ = ["contact_sheet", "most_tiles", "terminal_picture", "thumbnail"]

_SIDE, _MARGIN, _LABEL = 224, 8, 32  # pixels: side of a tile, margin around it, room for text below it
_WIDE, _HIGH = _SIDE + 2 * _MARGIN, _SIDE + 2 * _MARGIN + _LABEL
_COLUMNS = 5
_LONGEST = {".jpg": 65500, ".jpeg": 65500, ".webp": 16383}  # longest side that the format allows, in pixels
_CHUNK = 4096  # characters per escape sequence of kitty


def thumbnail(path: Path, side: int) -> Image.Image:
    """Return the image in RGB with a longer side of at most `side` pixels.

    Raises:
        BadSample: the image cannot be read (`read_picture`).
    """
    picture = read_picture(path, str(path), min_side=side).convert("RGB")
    picture.thumbnail((side, side))
    return picture


def most_tiles(suffix: str) -> int:
    """Return how many images fit on a contact sheet in a file with this suffix, such as ".jpg"."""
    longest = _LONGEST.get(suffix.lower())
    return sys.maxsize if longest is None else longest // _HIGH * _COLUMNS


def contact_sheet(matches: Sequence[Match]) -> Image.Image:
    """Draw rows of images with their ranks, scores and names. An image that can no longer be read is a grey tile."""
    columns = max(1, min(_COLUMNS, len(matches)))
    sheet = Image.new("RGB", (columns * _WIDE, math.ceil(len(matches) / columns) * _HIGH), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for place, match in enumerate(matches):
        left, upper = place % columns * _WIDE + _MARGIN, place // columns * _HIGH + _MARGIN
        try:
            tile = thumbnail(Path(match.path), _SIDE)
        except BadSample:
            tile = Image.new("RGB", (_SIDE, _SIDE), "lightgrey")
        sheet.paste(tile, (left + (_SIDE - tile.width) // 2, upper + (_SIDE - tile.height) // 2))
        name = "".join(x if x.isprintable() else "?" for x in Path(match.path).name)  # PIL measures single lines only
        for line, text in enumerate((f"{place + 1}   {match.score:.4f}", name)):
            while len(text) > 1 and draw.textlength(text, font) > _SIDE:
                text = text[:-2] + "…"
            draw.text((left, upper + _SIDE + 2 + 14 * line), text, "black", font)
    return sheet


def terminal_picture(picture: Image.Image, *, protocol: str, columns: int) -> str:
    """Return text that shows an image in a terminal.

    Args:
        protocol: "iterm" or "kitty" for terminals that show pixels with these escape sequences; "" for coloured
            characters of two pixels each, in 24-bit colours.
        columns: largest width in characters.
    """
    if protocol:
        file = io.BytesIO()
        picture.save(file, "PNG")
        data = base64.b64encode(file.getvalue()).decode()
        if protocol == "iterm":
            width = f"width={columns}" if picture.width > 8 * columns else f"width={picture.width}px"
            return f"\x1b]1337;File=inline=1;size={file.tell()};{width};preserveAspectRatio=1:{data}\a\n"
        chunks = [data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK)]
        first = f"a=T,f=100,c={columns}," if picture.width > 8 * columns else "a=T,f=100,"
        heads = [first, *[""] * (len(chunks) - 1)]
        more = [1] * (len(chunks) - 1) + [0]  # 1 if another chunk follows
        parts = zip(heads, more, chunks)
        return "".join(f"\x1b_G{head}m={follows};{chunk}\x1b\\" for head, follows, chunk in parts) + "\n"
    columns = min(columns, picture.width)
    small = picture.resize((columns, max(2, round(picture.height * columns / picture.width) // 2 * 2)))
    pixels = np.asarray(small)
    lines = []
    for upper, lower in zip(pixels[::2].tolist(), pixels[1::2].tolist()):
        cells = (f"\x1b[38;2;{a[0]};{a[1]};{a[2]}m\x1b[48;2;{b[0]};{b[1]};{b[2]}m\u2580" for a, b in zip(upper, lower))
        lines.append("".join(cells) + "\x1b[0m\n")
    return "".join(lines)
