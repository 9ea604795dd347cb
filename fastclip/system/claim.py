"""A folder that one call fills, and that only a call with the same options may go on with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastclip.system.durable import write_json
from fastclip.system.owner import LOCK
from fastclip.system.reading import read_json

__all__ = ["claim"]

_SHOWN = 40  # characters of a list in an error; paths, which differ at their ends, are shown whole


def claim(
    folder: Path,
    options: Mapping[str, Any],
    *,
    result: str,
    name: str = "options.json",
    older: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> None:
    """Record `options` in the file `name` of `folder`, or check that they are those that it records; `folder` exists.

    Args:
        result: a glob of what the call writes; "*" for a folder that must be empty.
        older: from what the file records to the same as this version would record it.

    Raises:
        ValueError: the folder holds results of other options, and the message names these; results of a version of
            fastclip that had other options; or results without options.
    """
    file = folder / name
    if file.is_file():
        before = older(read_json(file))
        if before.keys() != options.keys():
            raise ValueError(f"{folder} was begun by another version of fastclip: take another folder")
        now = json.loads(json.dumps(options))  # a tuple is read back as a list
        if changed := [key for key in now if before[key] != now[key]]:
            message = ", ".join(f"{key} was {_short(before[key])}, is {_short(now[key])}" for key in changed)
            raise ValueError(f"{folder} is that of another call: {message}; take another folder")
        return
    if foreign := next((path for path in folder.glob(result) if path.name != LOCK), None):
        raise ValueError(f"{foreign} was not written by this command: take another folder")
    write_json(file, dict(options), indent=1)


def _short(value: Any) -> str:
    text = str(value)
    return text if isinstance(value, str) or len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
