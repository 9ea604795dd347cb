"""Match a list of class names with the classes of a dataset."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Sequence

from fastclip.data.classes import imagenet

__all__ = ["WORDNET_ID", "join_names", "shown_names"]

logger = logging.getLogger(__name__)
WORDNET_ID = re.compile(r"n\d{8}")
_SHOWN = 5  # names in a message


def join_names(
    given: Sequence[str], classes: Sequence[str], *, what: str, spec: str, ordered: bool = False
) -> tuple[tuple[str, ...], list[int]]:
    """Match the names `given` with the `classes` of a dataset.

    A class is matched with the name that equals it, exactly or with differences of case, blanks, underscores and
    hyphens ignored. A class that is a WordNet id is matched with its name in CLIP's list. A line ``CLASS<TAB>NAME``
    gives the name NAME to the class CLASS, however different the two are.

    If some classes are still without a name, and the C classes have a natural order, all names are assigned in that
    order, unless a match contradicts it. The classes have such an order if they are the numbers 0 to C - 1, the numbers
    1 to C, or WordNet ids.

    Args:
        what: the name by which messages refer to `given`.
        spec: the name by which messages refer to the dataset.
        ordered: `given` and `classes` have the same order, such as ImageNet's, unless the names contradict it.

    Returns:
        The names, and for each class the index of its name among them.

    Raises:
        ValueError: there are more or fewer names than classes, or they cannot be matched. The message lists the
            classes without a name and the names without a class.
    """
    if len(given) != len(classes):
        raise ValueError(f"{what} has {len(given)} names, but {spec} has {len(classes)} classes")
    keys, names = list(given), tuple(given)
    if any("\t" in name for name in given):
        if not all(name.count("\t") == 1 for name in given):
            raise ValueError(f"{what}: all lines or none must have the form CLASS<TAB>NAME, with a class of {spec}")
        keys, names = ([name.split("\t")[k].strip() for name in given] for k in (0, 1))  # type: ignore[assignment]
    places = _by_name(keys, classes)
    if None in places:
        order = list(range(len(classes))) if ordered else _by_order(classes)
        if order is None or any(named not in (None, place) for named, place in zip(places, order)):
            raise ValueError(_unpaired(keys, classes, places, what, spec))
        if not ordered and all(place is None for place in places) and classes[order.index(0)] != "0":
            logger.warning(
                "%s: the names are matched with the classes in order, beginning with %s for class %r",
                spec,
                names[0],
                classes[order.index(0)],
            )
        places = list(order)
    return tuple(names), [place for place in places if place is not None]


def _by_name(keys: Sequence[str], classes: Sequence[str]) -> list[int | None]:
    """Return for each class the index of its key, or None if no key matches.

    If several keys are equal, the first belongs to the first class that matches.
    """
    places: list[int | None] = [None] * len(classes)
    # Exact matches come first, because `_plain` makes some different names equal.
    for aliases, plain in ((classes, str), (classes, _plain), (_clip_names(classes), _plain)):
        free = dict[str, list[int]]()
        for place, key in enumerate(keys):
            if place not in places:
                free.setdefault(plain(key), []).append(place)
        for number, alias in enumerate(aliases):
            if places[number] is None and alias and free.get(plain(alias)):
                places[number] = free[plain(alias)].pop(0)
    return places


def _by_order(classes: Sequence[str]) -> list[int] | None:
    """Return the place of each class in the order of the numbers or WordNet ids; None if the classes are neither."""
    if all(name.isascii() and name.isdecimal() for name in classes):
        numbers = [int(name) for name in classes]
        first = min(min(numbers), 1)
        return [number - first for number in numbers] if {*numbers} == {*range(first, first + len(classes))} else None
    if all(map(WORDNET_ID.fullmatch, classes)):
        ordered = sorted(classes)
        return [ordered.index(name) for name in classes]
    return None


def _clip_names(classes: Sequence[str]) -> list[str]:
    """Return CLIP's names of WordNet ids, "" for an unknown id; [] if the classes are not WordNet ids."""
    if not all(map(WORDNET_ID.fullmatch, classes)):
        return []
    try:
        places, names = imagenet.folder_places("imagenet"), imagenet.class_names("imagenet")
    except ImportError:
        return []
    return [names[places[name]] if name in places else "" for name in classes]


def _plain(name: str) -> str:
    return " ".join(re.sub(r"[_\-\s]+", " ", unicodedata.normalize("NFC", name)).casefold().split())


def _unpaired(keys: Sequence[str], classes: Sequence[str], places: Sequence[int | None], what: str, spec: str) -> str:
    nameless = [name for name, place in zip(classes, places) if place is None]
    unused = [key for place, key in enumerate(keys) if place not in places]
    return (
        f"{what} does not name the classes of {spec}. Classes without a name: {shown_names(nameless)}. Names without a "
        f"class: {shown_names(unused)}. To match them, write each line as CLASS<TAB>NAME"
    )


def shown_names(names: Sequence[str]) -> str:
    """Return the first five names for a message, with dots if there are more."""
    return ", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")
