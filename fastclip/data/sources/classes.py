"""Images in one folder per class."""

from __future__ import annotations

import logging
import os
from array import array
from collections.abc import Sequence
from pathlib import Path

from fastclip.data.classes import imagenet
from fastclip.data.classes.names import WORDNET_ID, join_names, shown_names
from fastclip.data.files import subfolders
from fastclip.data.source import PictureFiles, class_captions
from fastclip.data.sources.folder import pictures
from fastclip.system.plural import counted

__all__ = ["SPLITS", "ClassFolder"]

logger = logging.getLogger(__name__)
SPLITS = {"test", "train", "training", "val", "valid", "validation"}  # usual names for the folders of splits


class ClassFolder(PictureFiles):
    """All images in folders ``FOLDER/CLASS/``, at any depth, with their classes, as in torchvision's `ImageFolder`.

    The class names are the sorted names of the folders, with blanks in place of underscores. Folders named by WordNet
    ids are classes of ImageNet, in the order of their numbers and with CLIP's class names. The same holds for 1,000
    folders named 0 to 999, as in ImageNet-V2. Hidden files and folders are left out, and links to class folders are
    followed. The captions of an image are those of its class.

    Args:
        classes: one name per folder, matched with the folders' names (`join_names`); or one of
            `fastclip.data.classes.imagenet.SETS`. In the latter case the source has all classes of the set, even those
            without a folder.

    Attributes:
        folders: the sorted names of the class folders.

    Raises:
        OSError: the folder cannot be read.
        ValueError: there are no class folders, fewer than two classes, or folders without images. Folders are not among
            `classes`, or are unknown WordNet ids. The names in `classes` do not match the folders.
        ImportError: timm or open_clip_torch, which list ImageNet's classes, is not installed.
    """

    def __init__(self, spec: str, *, classes: str | Sequence[str] | None = None) -> None:
        super().__init__(spec, Path(spec))
        self.folders = folders = _class_folders(self._folder)
        self.class_names, places = _classes(spec, folders, classes)
        if len(self.class_names) < 2:
            raise ValueError(f"{spec}: there is only one class, {folders[0]}, but at least two are required")
        self._labels, empty = array("i"), list[str]()
        for folder, place in zip(folders, places, strict=True):
            before = len(self._names)
            for picture in pictures(self._folder / folder):
                self._names.append(os.path.join(folder, picture.name))
            self._labels.extend([place] * (len(self._names) - before))
            empty += [folder] if len(self._names) == before else []
        if empty:
            raise ValueError(f"{spec}: folders without images: {shown_names(empty)}")

    def captions(self, index: int) -> tuple[str, ...]:
        return class_captions(self.class_names[self._labels[index]], self.templates)

    def _label(self, index: int) -> int:
        return self._labels[index]


def _class_folders(folder: Path) -> list[str]:
    """Return the names of the class folders, sorted as text, or by value if all are numbers."""
    names = subfolders(folder)
    wanted = f"images must be in one folder per class: {folder}/CLASS/IMAGE"
    if not names:
        flat = sum(1 for _ in pictures(folder))
        flat_images = f"{counted(flat, 'image')} and " if flat else ""
        raise ValueError(f"{folder}: {flat_images}no class folders; {wanted}")
    if set(names) <= SPLITS:  # as classes they would make a model learn to tell train from val
        raise ValueError(f"{folder} holds {', '.join(names)}, which are splits, not classes: name one of these folders")
    return sorted(names, key=int) if all(map(_is_number, names)) else names


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def _classes(
    spec: str, folders: Sequence[str], classes: str | Sequence[str] | None
) -> tuple[tuple[str, ...], Sequence[int]]:
    """Return the class names, and for each folder the place of its class among them."""
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
            f"{spec}: {len(unknown)} of {len(folders)} folders are not classes of {name}: {shown_names(unknown)}"
        )
    return [places[folder] for folder in folders]
