"""Contact sheets: the answers to composed queries in a single image."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from fastclip.data.picture import drawn
from fastclip.evaluation.composed_retrieval import Composed
from fastclip.system.durable import write_bytes

__all__ = ["write_sheet"]

_SIDE, _GAP, _LINE = 128, 6, 22  # pixels


def write_sheet(path: str | Path, composed: Composed, *, queries: int = 50) -> None:
    """Write a PNG with one row per query: the query's line above the images that were retrieved.

    The target is marked by a frame.

    Args:
        path: output path.
        composed: results of `fastclip.evaluation.composed_retrieval.compose`.
        queries: maximum number of queries, of which the first ones are shown.
    """
    answers = composed.answers[:queries]
    columns = max(len(answer.pictures) for answer in answers)
    height = _LINE + _SIDE + _GAP
    sheet = Image.new("RGB", (max(4, columns) * (_SIDE + _GAP) + _GAP, len(answers) * height + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for row, answer in enumerate(answers):
        top = row * height + _GAP
        draw.text((_GAP, top), answer.query.line, "black", font)
        for column, (place, _) in enumerate(answer.pictures):
            tile = ImageOps.contain(composed.source[place].image.convert("RGB"), (_SIDE, _SIDE))
            left = _GAP + column * (_SIDE + _GAP)
            sheet.paste(tile, (left + (_SIDE - tile.width) // 2, top + _LINE + (_SIDE - tile.height) // 2))
            if column == answer.rank:
                box = (left - 2, top + _LINE - 2, left + _SIDE + 1, top + _LINE + _SIDE + 1)
                draw.rectangle(box, outline="#2a9d3a", width=3)
    data = io.BytesIO()
    sheet.save(data, "PNG", exif=drawn())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_bytes(Path(path), data.getvalue())
