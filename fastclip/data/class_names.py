"""Two lists of the same classes, joined by name."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Sequence

from fastclip.data import imagenet

__all__ = ["WORDNET_ID", "join_names", "shown_names"]

logger = logging.getLogger(__name__)
WORDNET_ID = re.compile(r"n\d{8}")
_SHOWN = 5  # names in a message


def join_names(
    given: Sequence[str], own: Sequence[str], *, what: str, spec: str, ordered: bool = False
) -> tuple[tuple[str, ...], list[int]]:
    """The names of `given`, and of each of the data's `own` classes its place among them.

    A class has the name that equals its own: exactly, else whatever the case, with blanks for underscores and hyphens;
    a WordNet id that of CLIP's list. ``OWN<TAB>NAME`` pairs any two. Classes that have an order, which are numbers, 0
    to C - 1 or 1 to C, and WordNet ids, have the names in this order where no name says otherwise.

    Args:
        what, spec: what messages call the two.
        ordered: both are in the order of the same numbers, such as ImageNet's, where no name says otherwise.

    Raises:
        ValueError: there are more or fewer names than classes; or names and classes cannot be paired, and the message
            lists the classes without a name and the names without a class.
    """
    if len(given) != len(own):
        raise ValueError(f"{what} has {len(given)} names, and {spec} {len(own)} classes")
    keys, names = list(given), tuple(given)
    if any("\t" in name for name in given):
        if not all(name.count("\t") == 1 for name in given):
            raise ValueError(f"{what}: every line, or none, must be a class of {spec}, a tab, and its name")
        keys, names = ([name.split("\t")[k].strip() for name in given] for k in (0, 1))  # type: ignore[assignment]
    places = _by_name(keys, own)
    if None in places:
        order = list(range(len(own))) if ordered else _by_order(own)
        if order is None or any(found not in (None, place) for found, place in zip(places, order)):
            raise ValueError(_told(keys, own, places, what, spec))
        if not ordered and all(place is None for place in places) and own[order.index(0)] != "0":
            logger.warning("%s: %s is the class %r, and so on in their order", spec, names[0], own[order.index(0)])
        places = list(order)
    return tuple(names), [place for place in places if place is not None]


def _by_name(keys: Sequence[str], own: Sequence[str]) -> list[int | None]:
    """The place of the key of each class; of namesakes, in which no model differs, the first to the first."""
    found: list[int | None] = [None] * len(own)
    for aliases, plain in ((own, str), (own, _plain), (_clip_names(own), _plain)):
        free = dict[str, list[int]]()
        for place, key in enumerate(keys):
            if place not in found:
                free.setdefault(plain(key), []).append(place)
        for number, alias in enumerate(aliases):
            if found[number] is None and alias and free.get(plain(alias)):
                found[number] = free[plain(alias)].pop(0)
    return found


def _by_order(own: Sequence[str]) -> list[int] | None:
    """The place of each class in their order, if they have one."""
    if all(name.isascii() and name.isdecimal() for name in own):
        numbers = [int(name) for name in own]
        first = min(min(numbers), 1)
        return [number - first for number in numbers] if {*numbers} == {*range(first, first + len(own))} else None
    if all(map(WORDNET_ID.fullmatch, own)):
        ordered = sorted(own)
        return [ordered.index(name) for name in own]
    return None


def _clip_names(own: Sequence[str]) -> list[str]:
    """Of WordNet ids, as far as they are known here."""
    if not all(map(WORDNET_ID.fullmatch, own)):
        return []
    try:
        places, names = imagenet.folder_places("imagenet"), imagenet.class_names("imagenet")
    except ImportError:
        return []
    return [names[places[name]] if name in places else "" for name in own]


def _plain(name: str) -> str:
    return " ".join(re.sub(r"[_\-\s]+", " ", unicodedata.normalize("NFC", name)).casefold().split())


def _told(keys: Sequence[str], own: Sequence[str], places: Sequence[int | None], what: str, spec: str) -> str:
    classes = [name for name, place in zip(own, places) if place is None]
    names = [key for place, key in enumerate(keys) if place not in places]
    return (
        f"{what} does not name the classes of {spec}: without a name {shown_names(classes)}; without a class "
        f"{shown_names(names)}; write lines of class, tab and name to pair them"
    )


def shown_names(names: Sequence[str]) -> str:
    """The first of them."""
    return ", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")
