"""Karpathy's splits of Flickr30K and COCO, on which retrieval is reported. Each image has several captions."""

from __future__ import annotations

import os
import re
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastclip.data.files import existing, read_file
from fastclip.data.source import PictureFiles, Strings
from fastclip.data.sources.captions import given_captions
from fastclip.system.reading import parse_json

__all__ = ["Karpathy", "absolute_split", "is_split_file", "split_places"]

# The shortest name that ends in .json is the file, because the folder after it may contain ".json" too.
_SPEC = re.compile(r"(?P<file>.+?\.json)(?::(?P<splits>[^:]*)(?::(?P<folder>.+))?)?", re.DOTALL | re.IGNORECASE)


def is_split_file(spec: str) -> bool:
    """Return True if `spec` has the form that `Karpathy` opens."""
    return _SPEC.fullmatch(spec) is not None


def absolute_split(spec: str) -> str:
    """Return a spec of `Karpathy` with the absolute paths of its file and its folder."""
    match = _SPEC.fullmatch(spec)
    assert match is not None, spec
    parts = (os.path.abspath(match["file"]), match["splits"], match["folder"] and os.path.abspath(match["folder"]))
    return ":".join(part for part in parts if part is not None)


def split_places(spec: str) -> list[Path]:
    """Return the file of a spec of `Karpathy` and the image folder that it names; [] for any other spec."""
    match = _SPEC.fullmatch(spec)
    return [Path(place) for place in match.group("file", "folder") if place] if match else []


class Karpathy(PictureFiles):
    """One or several splits of Karpathy's files, such as ``dataset_coco.json:test``, one sample per image.

    The files are ``dataset_coco.json``, ``dataset_flickr30k.json`` and ``dataset_flickr8k.json`` of Karpathy and
    Fei-Fei 2015. Each is an object with a list "images" of objects with "filename", "split", "sentences" (a list of
    objects with "raw") and optionally "filepath" (a folder such as val2014). Several splits are joined by "+". The
    usual training split of COCO is ``dataset_coco.json:train+restval``.

    The images are in the file's folder, or in ``images/`` or ``DATASET-images/`` there. Any other folder must be given
    in the spec, as in ``dataset_coco.json:test:/data/coco``. In each of these folders, the images may be in the
    subfolders that "filepath" names, or directly in the folder.

    Attributes:
        dataset: the name that the file states under "dataset", such as "coco" or "flickr30k", or "" if it states none.
        splits: the names of the splits in the spec.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not one of Karpathy's files, the spec names no split or an unknown one, or no image is
            found.
    """

    def __init__(self, spec: str) -> None:
        match = _SPEC.fullmatch(spec)
        assert match is not None, spec
        file = Path(match["file"])
        whole = _load(file)
        images, self.dataset = whole["images"], str(whole.get("dataset") or "")
        counts = Counter(image["split"] for image in images)
        self.splits = tuple((match["splits"] or "").split("+"))
        if unknown := [split for split in self.splits if split not in counts]:
            what = f"there is no split {unknown[0]!r}" if unknown[0] else f"name a split, as in {file}:test"
            raise ValueError(f"{spec}: {what}; {file} has {', '.join(f'{name} ({n:,})' for name, n in counts.items())}")
        images = [image for image in images if image["split"] in self.splits]
        folder, deep = _root(spec, file, match["folder"], self.dataset, images)
        super().__init__(spec, folder)
        self._captions, self._ends = Strings(), array("q", [0])
        for image in images:
            self._names.append(_name(image, deep))
            for sentence in image["sentences"]:
                self._captions.append(sentence["raw"])
            self._ends.append(len(self._captions))

    def captions(self, index: int) -> tuple[str, ...]:
        places = range(self._ends[index], self._ends[index + 1])
        return given_captions([self._captions[place] for place in places], self.key(index))

    def _file(self, index: int) -> Path:
        # The names on the disk and in the JSON file may have different Unicode normal forms.
        return existing(self._folder, self._names[index]) or super()._file(index)


def _load(file: Path) -> dict[str, Any]:
    """Return the object in the file after checking that its images have the required keys."""
    content = parse_json(read_file(file), str(file))
    images = content.get("images")
    if not isinstance(images, list) or not images:
        raise ValueError(f'{file} is not one of Karpathy\'s split files: it has no list "images"')
    for number, image in enumerate(images):
        try:
            texts = (image["filename"], image["split"], image.get("filepath", ""))
            sentences = [sentence["raw"] for sentence in image["sentences"]]
            good = all(isinstance(text, str) for text in (*texts, *sentences))
        except (AttributeError, KeyError, TypeError):
            good = False
        if not good:
            wanted = '"filename", "split" and "sentences", a list of objects with "raw"'
            raise ValueError(f"{file} is not one of Karpathy's split files: its image {number} must have {wanted}")
    return dict(content)


def _name(image: dict[str, Any], deep: bool) -> str:
    return f"{image['filepath']}/{image['filename']}" if deep and image.get("filepath") else image["filename"]


def _root(
    spec: str, file: Path, folder: str | None, dataset: str, images: Sequence[dict[str, Any]]
) -> tuple[Path, bool]:
    """Return the first folder that holds an image, and True if its images are in subfolders named by "filepath"."""
    beside = (file.parent, file.parent / "images", file.parent / f"{dataset}-images")
    folders = beside if folder is None else (Path(folder),)
    for root in folders:
        # COCO's archives unpack into such subfolders. Many users move all images into one folder.
        for deep in (True, False):
            if any(existing(root, _name(image, deep)) for image in images):
                return root, deep
    where, first = " or ".join(map(str, folders)), images[0]["filename"]
    name = f"{file}:{'+'.join(dict.fromkeys(image['split'] for image in images))}:FOLDER"
    raise ValueError(
        f"{spec}: none of {len(images):,} images is in {where}; the first is {first}. Name their folder: {name}"
    )
