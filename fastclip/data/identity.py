"""Which picture a sample has, whatever its name, and whether it is the one that was there before."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from fastclip.data.faults import BadSample
from fastclip.data.files import file_state
from fastclip.data.source import Source, picture_place

__all__ = ["picture_places", "picture_states"]


def picture_places(source: Source) -> Iterator[tuple[str, str]]:
    """The real path of the file that holds each sample's picture, "" where there is none, and the name of it inside.

    One picture has one place: spellings of its path, relative ones and links are the same.
    """
    return ((file, inside) for file, inside, _ in _found(source))


def picture_states(source: Source) -> Iterator[str]:
    """Of each sample a text that changes where its picture is another one: the place, and size and time of the file.

    For keys of what is kept from one call to the next (`fastclip.evaluation.features.FeatureStore`). Costs a look at
    each file's entry, and reads none.
    """
    for file, inside, state in _found(source):
        yield "\n".join((file, inside, "none" if state is None else file_state(state)))


def _found(source: Source) -> Iterator[tuple[str, str, os.stat_result | None]]:
    folders = dict[str, str]()
    last: tuple[str, str, os.stat_result | None] = ("", "", None)  # of a shard there are many in a row
    for index in range(len(source)):
        try:
            named, inside = picture_place(source, index)
        except BadSample:  # there is no such file
            named, inside = "", source.key(index)
        if named != last[0]:
            last = (named, *_real(named, folders))
        yield last[1], inside, last[2]


def _real(name: str, folders: dict[str, str]) -> tuple[str, os.stat_result | None]:
    """The file's real path and state; links of its folder are followed once for all files in it."""
    folder, base = os.path.split(name)
    try:
        state = os.lstat(name) if name else None
    except (OSError, ValueError):
        return os.path.abspath(name) if "\0" not in name else name, None
    if state is None or base in ("", ".", ".."):
        return name, state
    if stat.S_ISLNK(state.st_mode):
        real = os.path.realpath(name)
        return real, os.stat(real) if os.path.exists(real) else None
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    return os.path.join(folders[folder], base), state
