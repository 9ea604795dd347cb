"""A folder that one call fills, and that only the same call goes on with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastclip.durable import write_text

__all__ = ["claim"]

_NAME = "options.json"


def claim(folder: Path, options: Mapping[str, Any], *, result: str) -> None:
    """Make `folder` that of these options, which ``options.json`` in it tells.

    Args:
        result: a glob of what the call writes.

    Raises:
        ValueError: it is that of other options, which are named; or it holds results without options.
    """
    name = folder / _NAME
    if name.is_file():
        try:
            before = dict(json.loads(name.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name} is not what this command writes: {error}") from error
        changed = [key for key in {**before, **options} if before.get(key) != options.get(key)]
        if changed:
            told = ", ".join(f"{key} was {before.get(key)}, is {options.get(key)}" for key in changed)
            raise ValueError(f"{folder} is that of another call: {told}; take another folder")
    elif (other := next(folder.glob(result), None)) is not None:
        raise ValueError(f"{other} was not written by this command: take another folder")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(name, json.dumps(dict(options), indent=1) + "\n")
