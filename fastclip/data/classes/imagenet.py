"""The classes of ImageNet and its variants, from the package data of timm and open_clip_torch."""

from __future__ import annotations

from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

from fastclip.system.installed import installed_file

__all__ = ["SETS", "class_names", "folder_places", "wordnet_ids", "zero_shot_metadata"]

# For each test set, timm's file with the numbers of its classes; None means all 1,000 classes. Images of ImageNet-A
# (Hendrycks et al. 2021a) and ImageNet-R (Hendrycks et al. 2021b) are classified among the 200 classes of their test
# set, as in the papers.
SETS: dict[str, str | None] = {
    "imagenet": None,
    "imagenet-a": "imagenet_a_indices.txt",
    "imagenet-r": "imagenet_r_indices.txt",
}


@cache
def zero_shot_metadata() -> ModuleType:
    """Return open_clip's module of CLIP's class names and templates, without importing the rest of open_clip."""
    path = installed_file(
        "open_clip", "zero_shot_metadata.py", what="CLIP's list of class names and templates", install="open_clip_torch"
    )
    spec = spec_from_file_location("open_clip_zero_shot_metadata", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def wordnet_ids() -> tuple[str, ...]:
    """Return ImageNet's 1,000 WordNet ids by class number. They are in alphabetical order: n01440764, n01443537, ..."""
    return tuple(_timm("imagenet_synsets.txt"))


def class_names(name: str) -> tuple[str, ...]:
    """Return CLIP's names of the classes of one of `SETS`, in the order of the class numbers."""
    names = zero_shot_metadata().IMAGENET_CLASSNAMES
    return tuple(names[number] for number in _numbers(name))


def folder_places(name: str) -> dict[str, int]:
    """Return the index into `class_names` for every name that a class folder may have.

    Folder names are WordNet ids. Folders of all 1,000 classes may also have class numbers, as in ImageNet-V2 (Recht et
    al. 2019): folder ``10`` is class 10, although it is third in alphabetical order.
    """
    ids = wordnet_ids()
    places = {ids[number]: place for place, number in enumerate(_numbers(name))}
    return places | ({str(number): number for number in range(len(ids))} if SETS[name] is None else {})


def _numbers(name: str) -> list[int]:
    file = SETS[name]
    return list(range(len(wordnet_ids()))) if file is None else [int(number) for number in _timm(file)]


def _timm(name: str) -> list[str]:
    path = installed_file("timm", f"data/_info/{name}", what="ImageNet's list of classes", install="timm")
    return path.read_text(encoding="utf-8").split()
