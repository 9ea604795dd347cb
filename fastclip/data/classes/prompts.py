"""Captions of classes: templates and class names, of CLIP or of a file."""

from __future__ import annotations

from fastclip.data.classes.imagenet import zero_shot_metadata
from fastclip.system.reading import read_lines

__all__ = ["read_class_names", "read_templates"]

# CLIP's: the 80 for ImageNet (Radford et al. 2021, section 3.1.4), and the 7 that are almost as good.
_PUBLISHED = {"openai": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}


def read_templates(name: str) -> tuple[str, ...]:
    """Captions with ``{}`` in place of a class name: ``openai``, CLIP's 80 for ImageNet, ``simple``, its 7, or a file.

    A file holds one a line in UTF-8; CLIP_benchmark's ``{c}`` is ``{}``, and empty lines count for nothing.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no template, or a line has not one place for the class name; it is named.
        ImportError: open_clip_torch, which holds CLIP's, is not installed.
    """
    if name in _PUBLISHED:
        return tuple(str(template("{}")) for template in getattr(zero_shot_metadata(), _PUBLISHED[name]))
    templates = []
    for number, line in enumerate(_lines(name, "templates; openai and simple are CLIP's"), 1):
        template = line.replace("{c}", "{}")
        if template and (template.count("{}") != 1 or set("{}") & set(template.replace("{}", ""))):
            raise ValueError(f"{name}, line {number}: {line!r} must hold {{}} once, where the class name goes")
        templates += [template] if template else []
    if not templates:
        raise ValueError(f"{name} holds no template")
    return tuple(templates)


def read_class_names(name: str) -> tuple[str, ...]:
    """One a line of a file in UTF-8, perhaps with empty lines at its end.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds none, or an empty line before the last, which is named.
    """
    names = _lines(name, "class names")
    while names and not names[-1]:  # line ends at the end of a file name no class
        names.pop()
    if "" in names:
        raise ValueError(f"{name}, line {names.index('') + 1}: a class without a name")
    if not names:
        raise ValueError(f"{name} holds no class name")
    return tuple(names)


def _lines(name: str, what: str) -> list[str]:
    try:
        return [line.strip() for line in read_lines(name)]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {name} of {what}") from error
