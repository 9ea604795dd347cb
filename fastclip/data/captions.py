"""Captions as they lie in files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from fastclip.data.faults import BadSample
from fastclip.reading import parse_json

__all__ = ["first_captions", "given_captions", "json_captions", "json_fields", "text_captions"]

_UNTOLD = ("empty caption", "no caption")  # causes of files that another one beside them makes up for
_SHOWN = 8  # names in a message


def text_captions(data: bytes, key: str, *, lines: bool) -> tuple[str, ...]:
    """Captions of a text file in UTF-8: one a line, or one in all; without white space at their ends.

    Raises BadSample with `key` when there is none.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("damaged caption", key, f"its caption is not UTF-8: {error}") from error
    return given_captions(text.splitlines() if lines else [text], key)


def json_captions(data: bytes, key: str, field: str = "caption") -> tuple[str, ...]:
    """Captions of a JSON object with `field`: a string, as img2dataset writes it, or a list of strings.

    Raises BadSample with `key` when there is none.
    """
    try:
        found = parse_json(data, "its caption file")
    except ValueError as error:
        raise BadSample("damaged caption", key, str(error)) from error
    if field not in found:
        has = ", ".join([*map(str, found)][:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")
        raise BadSample("no caption", key, f'its caption file has no "{field}" (it has {has or "nothing"})')
    return given_captions(found[field], key, f'"{field}" in its JSON file')


def json_fields(data: bytes, *, without: tuple[str, ...] = ("caption",)) -> dict[str, Any]:
    """Of a JSON object all but these; nothing of what is none."""
    try:
        found = parse_json(data, "")
    except ValueError:
        return {}
    return {name: value for name, value in found.items() if name not in without}


def first_captions(readers: Iterable[Callable[[], tuple[str, ...]]]) -> tuple[str, ...]:
    """The captions of the first reader that has some; BadSample, the first one's, where none has."""
    first: BadSample | None = None
    for read in readers:
        try:
            return read()
        except BadSample as bad:
            if bad.fault.cause not in _UNTOLD:
                raise
            first = first or bad
    assert first is not None
    raise first


def given_captions(value: Any, key: str, what: str = "its caption") -> tuple[str, ...]:
    """The captions among a string or a list of strings, without white space at their ends; None is no caption.

    Raises BadSample with `key` for another kind of value, text that is not Unicode, or where nothing is left.
    """
    captions = [text for text in (value if isinstance(value, (list, tuple)) else [value]) if text is not None]
    if not all(isinstance(text, str) for text in captions):
        raise BadSample("damaged caption", key, f"{what} must be a string or a list of strings, is {value!r:.100}")
    given = tuple(text for text in map(str.strip, captions) if text)
    if not given:
        raise BadSample("empty caption", key, "its caption is empty")
    if any("\ud800" <= letter <= "\udfff" for text in given if not text.isascii() for letter in text):
        raise BadSample("damaged caption", key, f"{what} holds half a character (a lone surrogate)")
    return given
