"""A folder that one call fills, and that only the same call goes on with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastclip.data.picture import USUAL_PIXELS
from fastclip.durable import write_json
from fastclip.reading import read_json

__all__ = ["claim"]

_USUAL = {"max_pixels": USUAL_PIXELS}  # which older folders do not tell
_NAME = "options.json"


def claim(folder: Path, options: Mapping[str, Any], *, result: str) -> None:
    """Make `folder`, which exists, that of these options, which ``options.json`` in it tells.

    Args:
        result: a glob of what the call writes.

    Raises:
        ValueError: the folder holds results of other options, and the message names these; results of a version of
            fastclip that had other options; or results without options.
    """
    name = folder / _NAME
    if name.is_file():
        before = {key: value for key, value in _USUAL.items() if key in options} | read_json(name)
        if before.keys() != options.keys():
            raise ValueError(f"{folder} was begun by another version of fastclip: take another folder")
        changed = [key for key in options if before[key] != options[key]]
        if changed:
            told = ", ".join(f"{key} was {before[key]}, is {options[key]}" for key in changed)
            raise ValueError(f"{folder} is that of another call: {told}; take another folder")
    elif (other := next(folder.glob(result), None)) is not None:
        raise ValueError(f"{other} was not written by this command: take another folder")
    else:
        write_json(name, dict(options), indent=1)
