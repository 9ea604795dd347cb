"""A data set by its name on a command line."""

from __future__ import annotations

import difflib
from pathlib import Path

from fastclip.data.folder import Folder, pictures
from fastclip.data.source import Source
from fastclip.data.table import Table

__all__ = ["open_source"]

_KINDS = """what it may be:
  digits               handwritten digits with captions, which come with scikit-learn
  pairs.csv, .tsv      a table of pictures and captions, columns filepath and title
  folder               pictures, each with its captions in a .txt or .json file of the same name; or tar shards
  shards/*.tar         tar shards of img2dataset or webdataset; a path, a glob or shards/{00000..00009}.tar"""


def open_source(spec: str, *, held_out: bool = False) -> Source:
    """The samples of `spec`: ``digits``, a .csv or .tsv file, a folder, or .tar files; `Table` and its kin say more.

    A folder that is called digits is ``./digits``. A folder that holds tar files and no pictures is its shards.

    Args:
        held_out: of the digits, the fifth that is kept from training; the other kinds have no such part, and are whole.

    Raises:
        OSError: a file cannot be read.
        ValueError: `spec` is nothing of these, or is not in order; the message names the file.
        ImportError: a library that this kind needs is not installed.
    """
    path = Path(spec)
    if spec == "digits":
        return _digits(held_out)
    if spec.endswith(".tar") and not path.is_dir():
        return _shards(spec)
    if path.suffix.lower() in (".csv", ".tsv") and not path.is_dir():
        return Table(spec)
    if spec and path.is_dir():
        if next(pictures(path), None) is None and any(path.glob("*.tar")):
            return _shards(spec)
        return Folder(spec)
    raise ValueError(f"{_reason(spec)}; {_KINDS}")


def _digits(held_out: bool) -> Source:
    try:
        from fastclip.data.digits import DigitsSource
    except ModuleNotFoundError as error:
        raise ImportError(f"the digits come with {error.name}, which is not installed", name=error.name) from error
    return DigitsSource(held_out=held_out)


def _shards(spec: str) -> Source:
    try:
        from fastclip.data.shards import Shards, shard_paths
    except ModuleNotFoundError as error:
        raise ImportError(f"tar shards need {error.name}, which is not installed", name=error.name) from error
    folder = Path(spec)
    return Shards(spec, sorted(map(str, folder.glob("*.tar"))) if folder.is_dir() else shard_paths(spec))


def _reason(spec: str) -> str:
    path = Path(spec)
    if path.is_file():
        return f"{spec} is a file of no kind that holds data"
    if difflib.get_close_matches(spec, ["digits"]):
        return f"{spec!r} is no data set: did you mean 'digits'?"
    if path.name != spec or spec.endswith("/"):
        return f"there is no folder {spec}"
    return f"{spec!r} is no data set, and there is no folder of this name"
