"""Images as data URLs, which contain the image itself."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["heat_map", "thumbnail"]

_SIDE = 160  # pixels, twice what the page shows
_COLOUR = (99, 92, 242)  # visible on white and on black


def thumbnail(image: Image.Image) -> str:
    """Return the data URL of an image of any mode, scaled down to at most 160 pixels wide and high."""
    small = image.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    return _url(small, "JPEG", quality=85)


def heat_map(shares: NDArray[np.float64]) -> str:
    """Return the data URL of an image with one pixel per share of `shares` (C, C). Larger shares are more opaque."""
    opacity = np.sqrt(shares)  # the root keeps rare confusions visible
    colour = Image.new("RGB", shares.shape[::-1], _COLOUR)
    colour.putalpha(Image.fromarray((255 * opacity).round().astype(np.uint8)))
    return _url(colour, "PNG", optimize=True)


def _url(image: Image.Image, kind: str, **options: object) -> str:
    held = io.BytesIO()
    image.save(held, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(held.getvalue()).decode()}"
