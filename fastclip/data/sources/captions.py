"""Read captions from files and fields."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from fastclip.data.faults import BadSample
from fastclip.system.reading import parse_json

__all__ = ["first_captions", "given_captions", "json_captions", "json_fields", "text_captions"]

_T = TypeVar("_T")
_UNTOLD = ("empty caption", "no caption")  # causes after which another file of the sample may still hold a caption
_SHOWN = 8  # names in a message


def text_captions(data: bytes, key: str, *, lines: bool) -> tuple[str, ...]:
    """Return the captions of a text file in UTF-8, stripped of white space: one per line, or the whole text as one.

    Raises BadSample with `key` if there is none.
    """
    try:
        text = data.decode("utf-8-sig")  # drops the byte order mark that some editors write
    except UnicodeDecodeError as error:
        raise BadSample("damaged caption", key, f"its caption is not UTF-8: {error}") from error
    return given_captions(text.splitlines() if lines else [text], key)


def json_captions(data: bytes, key: str, field: str = "caption") -> tuple[str, ...]:
    """Return the captions in `field` of a JSON object: a string, as img2dataset writes it, or a list of strings.

    Raises BadSample with `key` if there is none.
    """
    try:
        fields = parse_json(data, "its caption file")
    except ValueError as error:
        raise BadSample("damaged caption", key, str(error)) from error
    if field not in fields:
        has = ", ".join([*map(str, fields)][:_SHOWN]) + (", ..." if len(fields) > _SHOWN else "")
        raise BadSample("no caption", key, f'its caption file has no "{field}" (it has {has or "nothing"})')
    return given_captions(fields[field], key, f'"{field}" in its JSON file')


def json_fields(data: bytes, *, without: tuple[str, ...] = ("caption",)) -> dict[str, Any]:
    """Return the fields of a JSON object except those in `without`; {} if the data are not a JSON object."""
    try:
        fields = parse_json(data, "")
    except ValueError:
        return {}
    return {name: value for name, value in fields.items() if name not in without}


def first_captions(readers: Iterable[Callable[[], _T]]) -> _T:
    """Return the result of the first reader that finds captions. If none does, raise the BadSample of the first."""
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
    """Return the captions in a string or a list of strings, stripped of white space, without None and empty ones.

    Raises BadSample with `key` if the value has another type, a text is not valid Unicode, or no caption remains.
    """
    texts = [text for text in (value if isinstance(value, (list, tuple)) else [value]) if text is not None]
    if not texts:
        raise BadSample("no caption", key, "it has no caption")
    if not all(isinstance(text, str) for text in texts):
        raise BadSample("damaged caption", key, f"{what} must be a string or a list of strings, got {value!r:.100}")
    given = tuple(text for text in map(str.strip, texts) if text)
    if not given:
        raise BadSample("empty caption", key, "its caption is empty")
    # No tokenizer can encode half of a surrogate pair.
    if any("\ud800" <= letter <= "\udfff" for text in given if not text.isascii() for letter in text):
        raise BadSample("damaged caption", key, f"{what} holds half a character (a lone surrogate)")
    return given
