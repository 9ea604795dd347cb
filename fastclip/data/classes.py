"""Pictures with a class each: in a folder a class, or of any kind of data that has classes."""

from __future__ import annotations

import logging
import os
from array import array
from collections.abc import Sequence
from pathlib import Path

from fastclip.data import imagenet
from fastclip.data.class_names import WORDNET_ID, join_names, shown_names
from fastclip.data.files import read_file
from fastclip.data.folder import pictures
from fastclip.data.picture import read_picture
from fastclip.data.prompts import read_class_names
from fastclip.data.source import Record, Source, class_captions
from fastclip.data.spec import holds_shards, open_source
from fastclip.data.strings import Strings

__all__ = ["SPLITS", "ClassFolder", "open_labelled"]

logger = logging.getLogger(__name__)
SPLITS = {"test", "train", "training", "val", "valid", "validation"}  # what folders of parts of a data set are called


def open_labelled(spec: str, *, classes: str | None = None, held_out: bool = True) -> Source:
    """Samples with classes: a `ClassFolder`, or what else `open_source` reads that has classes.

    Args:
        classes: their names: a file of one a line, or one of `fastclip.data.imagenet.SETS`; default: the data's own.
            They go with the data's classes by name (`join_names`); numbers in ``.cls`` files, whose classes have no
            names, are places in the list.
        held_out: as `open_source`'s.

    Raises:
        OSError, ValueError, ImportError: as `open_source`, `ClassFolder` and `read_class_names` do; also where the
            data have no classes, or another number of them.
    """
    names = classes if classes is None or classes in imagenet.SETS else read_class_names(classes)
    path = Path(spec)
    if spec and spec != "digits" and os.path.isdir(path) and not holds_shards(path):
        return ClassFolder(spec, classes=names)
    if isinstance(names, str):
        names = imagenet.class_names(names)
    source = open_source(spec, held_out=held_out, class_names=names or ())
    if not source.class_names:
        raise ValueError(f"{spec}: these data have no classes; {_LAYOUT}")
    if names is not None:
        own = source.class_names
        if own == tuple(names):  # shards that have no names themselves take what is given
            own = tuple(map(str, range(len(own))))
        told, places = join_names(names, own, what=str(classes), spec=spec, ordered=classes in imagenet.SETS)
        source.class_names = tuple(told[place] for place in places)
    return source


_LAYOUT = (
    "digits, hf: with a column `label`, FOLDER/CLASS/PICTURE and shards with KEY.cls have; "
    "a KEY.txt or KEY.json with a caption beside it goes before KEY.cls, and must not be there"
)


class ClassFolder:
    """Every picture of ``FOLDER/CLASS/``, at any depth, with the class of its folder; torchvision's `ImageFolder`.

    Class names are the folders', sorted, with blanks for underscores. Folders that are called by WordNet ids are
    classes of ImageNet, in the order of their numbers, with the names that CLIP has for them; so are 1,000 folders 0 to
    999, as ImageNet-V2 has them. What is hidden is left out, and links to folders of classes are followed. The captions
    of a picture are its class's. `folders` are the names of the class folders, sorted.

    Args:
        classes: names, one a folder, which go together by name (`join_names`); or one of
            `fastclip.data.imagenet.SETS`, whose classes all count, whether they have a folder or not.

    Raises:
        OSError: the folder cannot be read.
        ValueError: there are no class folders, or less than two classes; folders without pictures; folders that are
            not among `classes`, or unknown WordNet ids, by name; another number of names, or others.
        ImportError: timm or open_clip_torch, which know ImageNet's classes, is not installed.
    """

    templates: tuple[str, ...] = ()

    def __init__(self, spec: str, *, classes: str | Sequence[str] | None = None) -> None:
        self.spec = spec
        self._folder = Path(spec)
        self.folders = folders = _class_folders(self._folder)
        self.class_names, places = _classes(spec, folders, classes)
        if len(self.class_names) < 2:
            raise ValueError(f"{spec}: there is one class, {folders[0]}: nothing to tell apart")
        self._names, self._labels, empty = Strings(), array("i"), []
        for folder, place in zip(folders, places, strict=True):
            before = len(self._names)
            for picture in pictures(self._folder / folder):
                self._names.append(os.path.join(folder, picture.name))
            self._labels.extend([place] * (len(self._names) - before))
            empty += [folder] if len(self._names) == before else []
        if empty:
            raise ValueError(f"{spec}: folders without pictures: {shown_names(empty)}")

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Record:
        return self.read(index)

    def read(self, index: int, *, min_side: int | None = None) -> Record:
        """As `fastclip.data.source.read_sample`."""
        key = self.key(index)
        image = read_picture(Path(key), key, min_side=min_side)
        return Record(image, self.captions(index), key, self._labels[index])

    def captions(self, index: int) -> tuple[str, ...]:
        return class_captions(self.class_names[self._labels[index]], self.templates)

    def key(self, index: int) -> str:
        return str(self._folder / self._names[index])

    def picture_bytes(self, index: int) -> bytes:
        """As `fastclip.data.source.picture_bytes`."""
        return read_file(self.key(index))

    def picture_place(self, index: int) -> tuple[str, str]:
        """As `fastclip.data.source.picture_place`."""
        return self.key(index), ""


def _class_folders(folder: Path) -> list[str]:
    """Names, sorted as text, or by value where all are numbers."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    wanted = f"pictures must lie in a folder a class: {folder}/CLASS/PICTURE"
    if not names:
        flat = sum(1 for _ in pictures(folder))
        raise ValueError(f"{folder}: {f'{flat} pictures and ' if flat else ''}no class folders; {wanted}")
    if set(names) <= SPLITS:
        raise ValueError(f"{folder} holds {', '.join(names)}, which are no classes: name one of these folders")
    return sorted(names, key=int) if all(map(_is_number, names)) else names


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def _classes(
    spec: str, folders: Sequence[str], classes: str | Sequence[str] | None
) -> tuple[tuple[str, ...], Sequence[int]]:
    """Class names, and the place of every folder's among them."""
    if classes is None and {*folders} == {*map(str, range(1000))}:
        classes = "imagenet"
    if isinstance(classes, str):
        places = _places(spec, folders, classes)
        names = imagenet.class_names(classes)
        if missing := len(names) - len({*places}):
            logger.warning("%s: %d of %d classes of %s have no folder", spec, missing, len(names), classes)
        return names, places
    every = range(len(folders))
    if classes is not None:
        return join_names(classes, folders, what="the list of class names", spec=spec)
    if any(map(WORDNET_ID.fullmatch, folders)):
        names = imagenet.class_names("imagenet")
        return tuple(names[place] for place in _places(spec, folders, "imagenet")), every
    return tuple(folder.replace("_", " ") for folder in folders), every


def _places(spec: str, folders: Sequence[str], name: str) -> list[int]:
    places = imagenet.folder_places(name)
    if unknown := [folder for folder in folders if folder not in places]:
        raise ValueError(
            f"{spec}: {len(unknown)} of {len(folders)} folders are no classes of {name}: {shown_names(unknown)}"
        )
    return [places[folder] for folder in folders]
