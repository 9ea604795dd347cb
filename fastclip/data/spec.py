"""Open a dataset by its name on the command line."""

from __future__ import annotations

import difflib
import glob
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path

from fastclip.data.classes import imagenet
from fastclip.data.classes.names import join_names
from fastclip.data.classes.prompts import read_class_names
from fastclip.data.faults import noting
from fastclip.data.files import log_links, subfolders, tar_files
from fastclip.data.source import Source
from fastclip.data.sources.classes import ClassFolder
from fastclip.data.sources.columns import UNNAMED, Named, named_columns
from fastclip.data.sources.folder import Folder, NoCaptions, Uncaptioned, pictures
from fastclip.data.sources.karpathy import Karpathy, absolute_split, is_split_file, split_places
from fastclip.data.sources.mixture import Mixture
from fastclip.data.sources.table import Table

__all__ = ["absolute_spec", "holds_shards", "open_labelled", "open_pictures", "open_source", "spec_places"]

logger = logging.getLogger(__name__)
_KINDS = """a dataset can be given as:
  digits               handwritten digits with captions, which come with scikit-learn
  pairs.csv, .tsv      a table with columns of images (filepath) and captions (title)
  dataset_coco.json:test  a split of Karpathy's files for COCO and Flickr30K; train+restval joins two splits, and
                       :FOLDER after the split names the folder of the images
  folder               images, each with its captions in a .txt or .json file of the same name; or images without
                       captions, in one folder per class; or tar shards
  shards/*.tar         tar shards of img2dataset or webdataset; a path, a glob or shards/{00000..00009}.tar
  s3://x/{00..09}.tar  tar shards at URLs that fsspec can read; they are copied to a cache folder first
  hf:NAME, hf:NAME:SPLIT  a dataset of Hugging Face's datasets library
  SPEC#image=A,caption=B  a table or an hf: dataset with images in column A and captions in column B
  SPEC#caption=B       a folder or shards with captions in field B of the .json files
  2*A::0.5*B           several of these; each epoch draws every sample of A twice and half of the samples of B"""

_DIGITS = 100  # the most digits of a weight: floats are below 10^309, and int() refuses more than 4,300 digits
_WEIGHTED = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\*(.+)", re.DOTALL)


def open_source(
    spec: str, *, held_out: bool = False, class_names: Sequence[str] = (), problems: list[str] | None = None
) -> Source:
    """Open the samples that `spec` names.

    `spec` is ``digits``, a .csv or .tsv file (`Table`), a split of a .json file (`Karpathy`), a folder (`Folder`), tar
    shards or URLs of tar shards (`fastclip.data.shards.source.Shards`), or ``hf:NAME``
    (`fastclip.data.sources.hub.HubSource`). The columns of its images and captions may follow,
    ``A#image=photo,caption=text``. Several specs are joined by ``::``, each with an optional weight, ``2*A::0.5*B``
    (`Mixture`).

    A folder named digits is written as ``./digits``. A folder is read as shards if it holds tar files, and no image
    in it has captions or is in a subfolder. A folder whose images have no captions, and are all in one folder per
    class, is opened as a `ClassFolder`, with a warning. A spec that is the name of a file or a glob that matches files,
    such as ``0*.tar``, has no weight.

    Args:
        held_out: open the fifth of the digits that is held out from training. Other kinds of data ignore this option.
        class_names: class names of shards that have classes but no classnames.txt.
        problems: a list that receives a line for each shard, and each part of a mixture, that is damaged or cannot be
            used. The returned source consists of everything else. Without a list the first problem is raised.

    Raises:
        OSError: a file cannot be read.
        ValueError: `spec` is none of these kinds, or its data are invalid; the message names the file.
        ImportError: a library that this kind of data needs is not installed.
    """
    sources, weights = [], []
    for weight, part in [_weighted(part) for part in _parts(spec)]:  # all weights are read before any data
        with noting(problems):
            sources.append(_open(part, held_out, class_names, problems))
            weights.append(weight)
    if problems:
        last = problems[-1]
        problems[:] = [problem.partition("; " + _KINDS)[0] for problem in problems]
        if not sources:
            raise ValueError("; ".join([*problems[:-1], last]))  # the list of kinds appears once, in the last problem
    return sources[0] if weights == [1] else Mixture(spec, sources, weights)


def open_labelled(spec: str, *, classes: str | None = None, held_out: bool = True) -> Source:
    """Open samples with classes: a `ClassFolder`, or any source of `open_source` that has classes.

    Args:
        classes: a file with one class name per line, or one of `imagenet.SETS`; default: the names in the data. The
            names are matched with the classes of the data (`join_names`). If shards have no classnames.txt, the numbers
            in their ``.cls`` files are indices into the list of names.
        held_out: open the held-out fifth of the digits, as `open_source` does.

    Raises:
        OSError, ValueError, ImportError: as `open_source`, `ClassFolder` and `read_class_names` do. ValueError is also
            raised if the data have no classes, or if the number of classes differs from the number of names.
    """
    names = classes if classes is None or classes in imagenet.SETS else read_class_names(classes)
    if _is_folder(spec) and not holds_shards(Path(spec)):
        return ClassFolder(spec, classes=names)
    if isinstance(names, str):
        names = imagenet.class_names(names)
    source = open_source(spec, held_out=held_out, class_names=names or ())
    if not source.class_names:
        raise ValueError(f"{spec}: these data have no classes; {_LAYOUT}")
    if names is not None:
        known = source.class_names
        # Shards without class names already use the given names, indexed by the numbers in their .cls files.
        if known == tuple(names):
            known = tuple(map(str, range(len(known))))
        given, places = join_names(names, known, what=str(classes), spec=spec, ordered=classes in imagenet.SETS)
        source.class_names = tuple(given[place] for place in places)
    return source


_LAYOUT = (
    "data with classes are digits, hf: with a column `label`, FOLDER/CLASS/IMAGE, and shards with KEY.cls. If shards "
    "have both KEY.cls and captions, the captions take precedence: to use the classes, write the shards without "
    "KEY.txt and without captions in KEY.json"
)


def open_pictures(spec: str) -> Source:
    """Open a folder whose images have no captions as `Uncaptioned`, and anything else as `open_source` does."""
    if _is_folder(spec) and not holds_shards(Path(spec)):
        links: list[str] = []
        files = list(pictures(Path(spec), links=links))
        if files and not any(file.captioned for file in files):
            log_links(spec, links)
            return Uncaptioned(spec, Path(spec), [file.name for file in files])
    return open_source(spec)


def holds_shards(folder: Path) -> bool:
    """Return True if a folder holds tar files, and no image in it has captions or is in a subfolder."""
    return bool(tar_files(folder)) and not any(
        picture.captioned or os.path.dirname(picture.name) for picture in pictures(folder, links=[])
    )


def absolute_spec(spec: str) -> str:
    """Return `spec` with absolute paths, so that it means the same in every working directory.

    Different spellings of one path, such as ``d``, ``d/`` and ``./d``, give the same text. Weights, columns, splits,
    names of hf: datasets and URLs are kept.
    """
    return "::".join(map(_absolute, _parts(spec)))


def spec_places(spec: str) -> list[Path]:
    """Return the files and folders that `spec` names, whether they exist or not. The folders are not opened.

    Raises ValueError if a weight is 0 or has more than 100 digits.
    """
    return [place for part in _parts(spec) for place in _places(named_columns(_weighted(part)[1])[0])]


def _parts(spec: str) -> list[str]:
    # The name of a file may contain "::".
    return [spec] if os.path.exists(spec) else spec.split("::")


def _places(name: str) -> list[Path]:
    if name == "digits" or "://" in name:
        return []
    if name.startswith("hf:"):
        return [Path(name[3:].partition(":")[0])]
    places = [Path(name), *split_places(name)]
    if name.endswith(".tar") and not os.path.isfile(places[0]):
        with suppress(ImportError, ValueError):  # the pattern is not valid, or matches no file
            from fastclip.data.shards.source import shard_paths

            places += map(Path, shard_paths(name, []))
    return places


def _absolute(part: str) -> str:
    weight, name = _weighted(part)
    times, place = f"{weight}*" if weight != 1 else "", named_columns(name)[0]
    columns = name[len(place) :]
    if place.startswith("hf:"):
        folder, colon, split = place[3:].partition(":")
        place = f"hf:{os.path.abspath(folder)}{colon}{split}" if os.path.exists(folder) else place
    elif place != "digits" and "://" not in place:
        is_split = is_split_file(place) and not os.path.isdir(place)
        place = absolute_split(place) if is_split else os.path.abspath(place)
    return times + place + columns


def _weighted(part: str) -> tuple[Fraction, str]:
    match = _WEIGHTED.fullmatch(part)
    if match is None or glob.glob(part, recursive=True):  # 0*.tar is a glob, not the weight 0 of .tar
        return Fraction(1), part
    if len(match[1]) > _DIGITS:
        raise ValueError(f"{part}: the weight has more than {_DIGITS} digits")
    if not (weight := Fraction(match[1])):
        raise ValueError(f"{part}: the weight must be above 0")
    return weight, match[2]


def _open(whole: str, held_out: bool, class_names: Sequence[str], problems: list[str] | None) -> Source:
    spec, columns = named_columns(whole)
    path = Path(spec)
    if spec.startswith("pipe:"):
        raise ValueError(f"{spec}: commands are not run; give the URL itself, such as s3://bucket/{{00000..00009}}.tar")
    if spec.startswith("hf:") and spec.partition(":")[2].partition(":")[0]:
        return _hub(whole, spec, columns)
    if "://" not in spec and path.suffix.lower() in (".csv", ".tsv") and not os.path.isdir(path):
        return Table(whole, spec, columns=columns)
    if columns.image:
        raise ValueError(f"{whole}: #image= names a column of images, which only tables and hf: have")
    if "://" in spec:
        return _remote(whole, spec, class_names, columns.caption, problems)
    if spec.endswith(".tar") and not os.path.isdir(path):
        return _shards(whole, spec, class_names, columns.caption, problems)
    if _is_folder(spec):
        if holds_shards(path):
            return _shards(whole, spec, class_names, columns.caption, problems)
        return _folder(whole, spec, columns.caption)
    if columns != UNNAMED:
        raise ValueError(f"{whole}: #caption= names a column or a field, which these data do not have")
    if spec == "digits":
        return _digits(held_out)
    if is_split_file(spec):
        return Karpathy(spec)
    raise ValueError(f"{_reason(spec)}; {_KINDS}")


def _is_folder(spec: str) -> bool:
    return spec not in ("", "digits") and os.path.isdir(spec)


def _folder(whole: str, spec: str, caption: str) -> Source:
    """Return the images of a folder with their captions, or with classes if no image has a caption.

    Classes require that all images are in one folder per class. A class folder may be a link, which `Folder` does not
    follow.
    """
    try:
        return Folder(whole, spec, caption=caption)
    except NoCaptions as error:
        if caption or error.outside or not subfolders(spec):
            log_links(spec, error.links)
            raise
        try:
            classes = ClassFolder(spec)
        except ValueError as other:
            log_links(spec, error.links)
            raise ValueError(f"{error}. The folder cannot be read as a folder of classes either: {other}") from error
    shown = ", ".join(classes.class_names[:3])
    logger.warning(
        "%s: no image has a caption, so the %d folders are read as classes (%s, ...)",
        *(spec, len(classes.class_names), shown),
    )
    return classes


@contextmanager
def _naming_library(needs: str) -> Iterator[None]:
    """Turn a failed import inside the context into an ImportError that names the missing library.

    The libraries of one kind of data are imported when such data are opened, because they are optional.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        # The command line adds the advice which extra to install to messages with this ending
        raise ImportError(f"{needs} the module {error.name}, which is not installed", name=error.name) from error


def _digits(held_out: bool) -> Source:
    with _naming_library("the digits come with"):
        from fastclip.data.sources.digits import DigitsSource
    return DigitsSource(held_out=held_out)


def _shards(whole: str, spec: str, class_names: Sequence[str], caption: str, problems: list[str] | None) -> Source:
    with _naming_library("tar shards need"):
        from fastclip.data.shards.source import Shards, shard_paths
    folder = Path(spec)
    paths = list(map(str, tar_files(folder))) if os.path.isdir(folder) else shard_paths(spec, problems)
    return Shards(whole, paths, class_names=class_names, caption=caption, problems=problems)


def _remote(whole: str, spec: str, class_names: Sequence[str], caption: str, problems: list[str] | None) -> Source:
    with _naming_library("shards at URLs need"):
        from fastclip.data.shards.remote import local_copies, shard_urls
        from fastclip.data.shards.source import Shards
    copies = local_copies(shard_urls(spec), problems)
    names = list(copies)
    return Shards(whole, [*copies.values()], names, class_names=class_names, caption=caption, problems=problems)


def _hub(whole: str, spec: str, columns: Named) -> Source:
    with _naming_library(f"{spec} needs"):
        from fastclip.data.sources.hub import HubSource
    return HubSource(whole, spec, columns=columns)


def _reason(spec: str) -> str:
    path = Path(spec)
    if os.path.isfile(path):
        return f"{spec} is not a file of a supported kind"
    if difflib.get_close_matches(spec, ["digits"]):
        return f"{spec!r} is not a dataset: did you mean 'digits'?"
    if path.name != spec or spec.endswith("/"):
        return f"there is no folder {spec}"
    return f"{spec!r} is not a dataset, and there is no folder with this name"
