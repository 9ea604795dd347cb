"""Templates and class names, from which captions of classes are made; published by CLIP or read from a file."""

from __future__ import annotations

from fastclip.data.classes.imagenet import zero_shot_metadata
from fastclip.system.reading import read_lines

__all__ = ["read_class_names", "read_templates"]

# CLIP's 80 templates for ImageNet (Radford et al. 2021, section 3.1.4), and the 7 that are almost as good.
_PUBLISHED = {"openai": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}


def read_templates(name: str) -> tuple[str, ...]:
    """Return templates: captions with ``{}`` in place of a class name.

    `name` is ``openai`` for CLIP's 80 templates for ImageNet, ``simple`` for CLIP's 7, or a file in UTF-8 with one
    template per line. In a file ``{c}`` may stand for ``{}``, as in CLIP_benchmark, and empty lines are ignored.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file holds no template, or a line does not contain ``{}`` exactly once; the message names the
            line.
        ImportError: open_clip_torch, which contains CLIP's templates, is not installed.
    """
    if name in _PUBLISHED:
        return tuple(str(template("{}")) for template in getattr(zero_shot_metadata(), _PUBLISHED[name]))
    templates = []
    for number, line in enumerate(_lines(name, "a file of templates, or openai or simple for CLIP's templates"), 1):
        template = line.replace("{c}", "{}")
        if template and (template.count("{}") != 1 or set("{}") & set(template.replace("{}", ""))):
            raise ValueError(f"{name}, line {number}: {line!r} must contain {{}} once, in place of the class name")
        templates += [template] if template else []
    if not templates:
        raise ValueError(f"{name} contains no template")
    return tuple(templates)


def read_class_names(name: str) -> tuple[str, ...]:
    """Return class names from a file in UTF-8, one name per line. Empty lines at the end are ignored.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file contains no name, or an empty line before the last name; the message names the line.
    """
    names = _lines(name, "a file of class names")
    while names and not names[-1]:  # empty lines at the end of the file do not stand for classes
        names.pop()
    if "" in names:
        raise ValueError(f"{name}, line {names.index('') + 1}: the class name is empty")
    if not names:
        raise ValueError(f"{name} contains no class name")
    return tuple(names)


def _lines(name: str, what: str) -> list[str]:
    try:
        return [line.strip() for line in read_lines(name)]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {name}: give {what}") from error
