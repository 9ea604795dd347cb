"""Reading of untrusted files: unexpected content raises a ValueError that names the file. No code in them is run."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["open_tensors", "parse_json", "read_json", "read_lines", "read_tensors", "read_yaml"]

_KINDS: dict[type, str] = {dict: "an object of names and values", list: "a list"}


def read_json(path: str | Path, kind: type = dict) -> Any:
    """Return the value in a JSON file, which must be a `kind`.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not UTF-8, not JSON, nested too deep, or contains another kind of value. The message
            names the file.
    """
    return parse_json(Path(path).read_bytes(), str(path), kind)


def parse_json(data: str | bytes, where: str, kind: type = dict) -> Any:
    """Return the value of JSON text, which must be a `kind`. Errors are those of `read_json`, and name `where`."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, kind):
        wanted = _KINDS.get(kind) or f"a {kind.__name__}"
        raise ValueError(f"{where} must hold {wanted}, got {type(value).__name__}")
    return value


def read_lines(path: str | Path) -> list[str]:
    """Return the lines of a UTF-8 text file, without line ends and byte order mark.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not UTF-8. The message names it.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the names and values of a YAML file. Errors are those of `read_json`, also for a repeated name."""
    import yaml

    try:
        loader = yaml.SafeLoader(Path(path).read_text(encoding="utf-8"))  # creates data only
        try:
            node = loader.get_single_node()
            names = [(key.tag, key.value) for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
            values = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        # Constructors of values raise the others
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split()) or type(error).__name__}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold names and values, such as `batch_size: 256`")
    if twice := next((name for name in names if names.count(name) > 1), None):  # yaml would silently take the last one
        raise ValueError(f"{path}: {twice[1]} is given twice")
    return {str(name): value for name, value in values.items()}


@contextmanager
def open_tensors(file: str | Path, *, device: str = "cpu") -> Iterator[Any]:
    """Open a safetensors file, as `safetensors.safe_open` does, with the errors of `read_tensors`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt", device=device) as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{file} is not a complete safetensors file: {error}") from error


def read_tensors(file: str | Path, names: Collection[str] = (), *, device: str = "cpu") -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Args:
        names: the tensors to read. If empty, all are read.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged or lacks one of the `names`. The message contains the file and the names.
    """
    with open_tensors(file, device=device) as opened:
        if missing := sorted(set(names) - set(opened.keys())):
            raise ValueError(f"{file} holds no tensor {', '.join(missing)}; it holds {', '.join(opened.keys())}")
        return {name: opened.get_tensor(name) for name in names or opened.keys()}
