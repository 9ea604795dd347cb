"""Output folders that record the options of their call, so that only a call with the same options may resume."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastclip.system.durable import write_json
from fastclip.system.owner import LOCK
from fastclip.system.reading import read_json

__all__ = ["claim"]

_SHOWN = 40  # characters of a list in an error message; paths are shown in full, because they differ at their ends


def claim(
    folder: Path,
    options: Mapping[str, Any],
    *,
    result: str,
    name: str = "options.json",
    older: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> None:
    """Record `options` in the file `name` of an existing folder, or check that the file records the same options.

    Args:
        result: glob of the files that the call writes, or "*" if the folder must be empty.
        older: converts the options that an older version recorded to the form of this version.

    Raises:
        ValueError: the folder records other values of the options (the message names them), or it was written by a
            version of fastclip that has other options, or it contains results but no record of the options.
    """
    file = folder / name
    if file.is_file():
        before = older(read_json(file))
        if before.keys() != options.keys():
            raise ValueError(f"{folder} was created by another version of fastclip: choose another folder")
        now = json.loads(json.dumps(options))  # a tuple is read back as a list
        if changed := [key for key in now if before[key] != now[key]]:
            message = ", ".join(f"{key} was {_short(before[key])}, is now {_short(now[key])}" for key in changed)
            raise ValueError(f"{folder} belongs to another call: {message}; choose another folder")
        return
    if foreign := next((path for path in folder.glob(result) if path.name != LOCK), None):
        raise ValueError(f"{foreign} was not written by this command: choose another folder")
    write_json(file, dict(options), indent=1)


def _short(value: Any) -> str:
    text = str(value)
    return text if isinstance(value, str) or len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
