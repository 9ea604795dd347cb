"""A data set by its name on a command line."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from fastclip.data.folder import Folder, pictures
from fastclip.data.karpathy import Karpathy, is_split_file
from fastclip.data.mixture import Mixture
from fastclip.data.source import Source
from fastclip.data.table import Table

__all__ = ["holds_shards", "open_source"]

_KINDS = """what it may be:
  digits               handwritten digits with captions, which come with scikit-learn
  pairs.csv, .tsv      a table of pictures and captions, columns filepath and title
  dataset_coco.json:test  a split of Karpathy's files of COCO and Flickr30K; train+restval, and :FOLDER of the pictures
  folder               pictures, each with its captions in a .txt or .json file of the same name; or tar shards
  shards/*.tar         tar shards of img2dataset or webdataset; a path, a glob or shards/{00000..00009}.tar
  s3://x/{00..09}.tar  the same behind a URL that fsspec reads; they are copied to a cache folder first
  hf:NAME, hf:NAME:SPLIT  a data set of Hugging Face's datasets library
  2*A::0.5*B           several of these; an epoch draws each sample of A twice, and half of those of B"""

_WEIGHTED = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\*(.+)", re.DOTALL)


def open_source(spec: str, *, held_out: bool = False, class_names: Sequence[str] = ()) -> Source:
    """The samples of `spec`: ``digits``, a .csv or .tsv file, a split of a .json file, a folder, .tar files or URLs of
    them, ``hf:NAME``, or several of these, joined by ``::`` and each perhaps with a weight before it, ``2*A::0.5*B``;
    `Table` and its kin say more.

    A folder that is called digits is ``./digits``. A folder that holds tar files, and no pictures with captions, is its
    shards. What is the name of a file, or a glob that finds some, has no weight: ``0*.tar``.

    Args:
        held_out: of the digits, the fifth that is kept from training; the other kinds have no such part, and are whole.
        class_names: of shards with classes that have no classnames.txt.

    Raises:
        OSError: a file cannot be read.
        ValueError: `spec` is nothing of these, or is not in order; the message names the file.
        ImportError: a library that this kind needs is not installed.
    """
    parts = [spec] if os.path.exists(spec) else spec.split("::")
    weighted = [_weighted(part) for part in parts]
    sources = [_open(part, held_out, class_names) for _, part in weighted]
    weights = [weight for weight, _ in weighted]
    return sources[0] if weights == [1] else Mixture(spec, sources, weights)


def holds_shards(folder: Path) -> bool:
    """Whether a folder's data are its tar files: no picture beside them has captions, and none lies in a folder."""
    return any(folder.glob("*.tar")) and not any(
        found.told or os.path.dirname(found.name) for found in pictures(folder)
    )


def _weighted(part: str) -> tuple[Fraction, str]:
    match = _WEIGHTED.fullmatch(part)
    if match is None or glob.glob(part, recursive=True):
        return Fraction(1), part
    if not (weight := Fraction(match[1])):
        raise ValueError(f"{part}: the weight must be above 0")
    return weight, match[2]


def _open(spec: str, held_out: bool, class_names: Sequence[str]) -> Source:
    path = Path(spec)
    if spec == "digits":
        return _digits(held_out)
    if spec.startswith("pipe:"):
        raise ValueError(f"{spec}: commands are not run; give the URL itself, such as s3://bucket/{{00000..00009}}.tar")
    if "://" in spec:
        return _remote(spec, class_names)
    if spec.startswith("hf:"):
        return _hub(spec)
    if spec.endswith(".tar") and not path.is_dir():
        return _shards(spec, class_names)
    if path.suffix.lower() in (".csv", ".tsv") and not path.is_dir():
        return Table(spec)
    if is_split_file(spec) and not path.is_dir():
        return Karpathy(spec)
    if spec and path.is_dir():
        return _shards(spec, class_names) if holds_shards(path) else Folder(spec)
    raise ValueError(f"{_reason(spec)}; {_KINDS}")


def _digits(held_out: bool) -> Source:
    try:
        from fastclip.data.digits import DigitsSource
    except ModuleNotFoundError as error:
        raise ImportError(f"the digits come with {error.name}, which is not installed", name=error.name) from error
    return DigitsSource(held_out=held_out)


def _shards(spec: str, class_names: Sequence[str]) -> Source:
    try:
        from fastclip.data.shards import Shards, shard_paths
    except ModuleNotFoundError as error:
        raise ImportError(f"tar shards need {error.name}, which is not installed", name=error.name) from error
    folder = Path(spec)
    paths = sorted(map(str, folder.glob("*.tar"))) if folder.is_dir() else shard_paths(spec)
    return Shards(spec, paths, class_names=class_names)


def _remote(spec: str, class_names: Sequence[str]) -> Source:
    try:
        from fastclip.data.remote import local_copies, shard_urls
        from fastclip.data.shards import Shards
    except ModuleNotFoundError as error:
        raise ImportError(f"shards behind URLs need {error.name}, which is not installed", name=error.name) from error
    urls = shard_urls(spec)
    return Shards(spec, local_copies(urls), urls, class_names=class_names)


def _hub(spec: str) -> Source:
    try:
        from fastclip.data.hub import HubSource
    except ModuleNotFoundError as error:
        raise ImportError(f"{spec} needs {error.name}, which is not installed", name=error.name) from error
    return HubSource(spec)


def _reason(spec: str) -> str:
    path = Path(spec)
    if path.is_file():
        return f"{spec} is a file of no kind that holds data"
    if difflib.get_close_matches(spec, ["digits"]):
        return f"{spec!r} is no data set: did you mean 'digits'?"
    if path.name != spec or spec.endswith("/"):
        return f"there is no folder {spec}"
    return f"{spec!r} is no data set, and there is no folder of this name"
