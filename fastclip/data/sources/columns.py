"""Choose the columns or fields that hold the images and captions of a dataset."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["CAPTION_COLUMNS", "IMAGE_COLUMNS", "UNNAMED", "Named", "choose", "named_columns"]

logger = logging.getLogger(__name__)
# The first of these that exists is used. open_clip's defaults come first.
IMAGE_COLUMNS = ("filepath", "image", "path", "file_name")
CAPTION_COLUMNS = ("title", "caption", "text")

_NAMED = re.compile(r"(?P<rest>.+)#(?P<named>(?:image|caption)=[^,]+(?:,(?:image|caption)=[^,]+)?)", re.DOTALL)


class Named(NamedTuple):
    """The columns of images and captions that the user has named, or ""."""

    image: str = ""
    caption: str = ""


UNNAMED = Named()


def named_columns(spec: str) -> tuple[str, Named]:
    """Split ``SPEC#image=NAME,caption=NAME`` into SPEC and the names, either of which may be left out.

    Raises ValueError if one of them is given twice.
    """
    match = None if os.path.exists(spec) else _NAMED.fullmatch(spec)  # the name of a file may look like this
    if match is None:
        return spec, UNNAMED
    kinds, names = zip(*(pair.split("=", 1) for pair in match["named"].split(",")), strict=True)
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"{spec}: {kinds[0]}= is given twice")
    return match["rest"], Named(**dict(zip(kinds, names, strict=True)))


def choose(names: Sequence[str], kind: str, known: Sequence[str], wanted: str, spec: str) -> int | None:
    """Return the index among `names` of the column `wanted`, or of the first column in `known` if `wanted` is "".

    Case is ignored. If several of the `known` columns exist, the log says which one is used.

    Args:
        kind: "image" or "caption", for messages.

    Returns:
        The index, or None if none of the `known` columns exists.

    Raises:
        ValueError: the column `wanted` does not exist, or two columns have the chosen name.
    """
    lower = [name.strip().lower() for name in names]  # spreadsheets write "Title", and blanks after a comma
    asked = [wanted.strip().lower()] if wanted else list(known)
    there = [name for name in asked if name in lower]
    if not there:
        if wanted:
            raise ValueError(f"{spec}: there is no column {wanted} among {', '.join(names)}")
        return None
    if lower.count(there[0]) > 1:
        raise ValueError(f"{spec}: {lower.count(there[0])} columns are called {there[0]}")
    if len(there) > 1:
        others = " and ".join(there[1:])
        how = f"{spec.partition('#')[0]}#{kind}={there[1]}"
        logger.warning("%s: the column %s is used, not %s; to use another, write %s", spec, there[0], others, how)
    return lower.index(there[0])
