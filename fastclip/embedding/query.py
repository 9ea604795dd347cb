"""What is searched for: texts and pictures with weights, added and subtracted.

``fastclip search`` and ``fastclip eval compose`` have one grammar. A query is a row of terms between ``+`` and ``-``,
which are operators where white space is around them, outside of quotes. ``2:`` or ``0.5:`` directly before a term is
its weight, unless a digit follows (``16:9 screenshot`` is a text) that begins no picture's name (``2:001.jpg``). A term
in double quotes is a text as it stands.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from fastclip.data.faults import BadSample
from fastclip.data.picture import PICTURE_SUFFIXES, read_picture

__all__ = ["Term", "combine", "parse_query", "parse_terms", "parse_texts", "picture_path", "reading", "split_at"]

_CANCELLED = 1e-5  # length of a sum in units of its weights, below which rounding alone decides its direction
_MIN_LENGTH, _MAX_LENGTH = (float(limit) for limit in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))

_NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)"
_QUOTED = re.compile(r'"([^"]*)"')
# An operator is a word of its own ("semi-trailer" is a word), outside of quotes.
_WORD = re.compile(rf'(?<!\S)(?:(?P<operator>[+-]|=>)|(?:{_NUMBER}:)?"[^"]*")(?!\S)')
_WEIGHTED = re.compile(rf"({_NUMBER}):(\S.*)", re.DOTALL)  # "10: a film" is a text
_PATH = re.compile(r"(/|\./|\.\./|~/|file://|[a-z]:\\)", re.IGNORECASE)
# What a file's name ends in that is meant to be a picture, whether it can be read or not
_SUFFIXES = PICTURE_SUFFIXES | {".jif", ".dib", ".ico", ".tga"}
# What may not have been read as it was meant: "3 : 2", "dir/photo", "photo.png", an odd quote
_DOUBTFUL = re.compile(rf"{_NUMBER}\s*:.*|[^\s/]*/\S*|\S*\w\.\w{{2,4}}|.*\"", re.DOTALL)


class Term(NamedTuple):
    """A text, or a picture's path, and its weight, which is negative where it is subtracted."""

    weight: float
    text: str = ""
    path: Path | None = None
    quoted: bool = False  # the text is no name of a picture


def parse_query(query: str, *, add: Sequence[str] = (), subtract: Sequence[str] = ()) -> list[Term]:
    """``"2:golden retriever + ./pool.jpg - fruit"`` as three terms, a picture being one that `picture_path` finds.

    Args:
        add: more terms, which are not looked at for operators.
        subtract: likewise.

    Raises:
        ValueError: as `parse_terms` and `picture_path`, or a term is not UTF-8.
    """
    terms = parse_terms(query)
    terms += [_term(1, text, query) for text in add] + [_term(-1, text, query) for text in subtract]
    return [_picture(term) for term in terms]


def parse_terms(query: str) -> list[Term]:
    """Return the terms as `parse_texts` does, but a query that is the path of a file as a whole as one."""
    is_file = _file(_weighted(query.strip())[1]) is not None
    return [_term(1, query, query)] if is_file else parse_texts(query)


def parse_texts(query: str) -> list[Term]:
    """Return the terms of a query, all of them texts: of those who may not name files.

    Raises:
        ValueError: a term is empty, or begins with a quote and does not end with its second one; the query is named.
    """
    (_, first), *others = split_at(query, "+", "-")
    signed = [(1, first)] if first.strip() or not others else []  # else a sign stands before the first term
    signed += [(-1 if operator == "-" else 1, text) for operator, text in others]
    return [_term(sign, text, query) for sign, text in signed]


def split_at(query: str, *operators: str) -> list[tuple[str, str]]:
    """Return what stands before, between and after words of `operators`, with the word before it, "" at first.

    What is quoted, with its weight, holds no operators.
    """
    parts, operator, start = list[tuple[str, str]](), "", 0
    for match in _WORD.finditer(query):
        if (word := match["operator"]) and word in operators:
            parts.append((operator, query[start : match.start()]))
            operator, start = word, match.end()
    return [*parts, (operator, query[start:])]


def picture_path(text: str) -> Path | None:
    """Return the file that the text of a term names, None where it is plain text.

    A picture is named by its place (``/``, ``./``, ``../``, ``~/``, ``file://``, ``C:\\``), by the ending of a
    picture's name, or else by a file of this name that holds a picture.

    Raises:
        ValueError: the text must be a picture, and there is no such file; or it is the address of a web page.
    """
    if re.match("https?://", text):
        raise ValueError(f"{text}: a picture to search by must be a file; save it first")
    path = _file(text)
    if path is None and _is_path(text):
        raise ValueError(f'there is no picture {text} to search by; a text of this name stands in "quotes"')
    return path if path is not None and (_is_path(text) or _holds_picture(path)) else None


def reading(query: str, terms: Sequence[Term]) -> str:
    """Say in a line how the terms were read, "" where the query can be read in one way only."""
    if len(terms) == 1 and terms[0].weight == 1:
        text = query.strip()
        if terms[0].path is None and terms[0].text == text and not _DOUBTFUL.fullmatch(text):
            return ""
        if terms[0].path is not None and _is_path(text):
            return ""
    return " ".join(
        f"{'-' if term.weight < 0 else '+'} {abs(term.weight):g} * "
        + (f"text {json.dumps(term.text, ensure_ascii=False)}" if term.path is None else f"picture {term.path}")
        for term in terms
    )


def combine(vectors: Iterable[npt.NDArray[np.float32]], weights: Iterable[float]) -> npt.NDArray[np.float32]:
    """The weighted sum (D,) of unit vectors, which is not scaled to length 1, as rclip's: a score is the weighted sum
    of the terms' cosines.

    Raises:
        ValueError: a weight is not finite, the terms cancel each other, or float32 cannot hold the sum.
    """
    weights = list(weights)
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights must be finite numbers, got {', '.join(f'{weight:g}' for weight in weights)}")
    with np.errstate(invalid="ignore", over="ignore"):  # a weight may be as large as one likes
        total = np.sum([weight * vector.astype(np.float64) for vector, weight in zip(vectors, weights)], axis=0)
    length = math.hypot(*total.tolist())  # whose squares neither overflow nor vanish
    if length <= sum(_CANCELLED * abs(weight) for weight in weights):
        raise ValueError("the terms of the query cancel each other: nothing is left to search for")
    if not _MIN_LENGTH <= length <= _MAX_LENGTH:
        raise ValueError("the query has no finite vector: is a weight too large or too small, or the model damaged?")
    return total.astype(np.float32)


def _term(sign: int, text: str, query: str) -> Term:
    weight, text = _weighted(text.strip())
    quoted = _QUOTED.fullmatch(text)
    if quoted is None and text.startswith('"'):  # read as a text, it would hide a missing quote or operator
        raise ValueError(f"the query {query!r} has a quote that is not closed, or a word beside one, at {text!r}")
    text = text if quoted is None else quoted[1].strip()
    if not text:
        raise ValueError(f"the query {query!r} has an empty term")
    return Term(sign * weight, text, quoted=quoted is not None)


def _weighted(text: str) -> tuple[float, str]:
    match = _WEIGHTED.fullmatch(text)
    if match is None or (match[2][0].isdigit() and not _is_path(match[2])):
        return 1.0, text
    return float(match[1]), match[2]


def _picture(term: Term) -> Term:
    """The term, as a picture where its text is the path of one."""
    if not term.quoted and (path := picture_path(term.text)) is not None:
        return Term(term.weight, path=path)
    try:
        term.text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the query {term.text!r} is neither UTF-8 nor the name of a file") from error
    return term


def _is_path(text: str) -> bool:
    """Return True if nothing but a picture's path can be meant."""
    return _PATH.match(text) is not None or os.path.splitext(text)[1].lower() in _SUFFIXES


def _file(text: str) -> Path | None:
    """The file of this name."""
    names = [text]
    if text.lower().startswith("file://"):
        names = [text[7:], unquote(text[7:])]  # what programs copy has %20 for a blank
    return next((Path(name) for name in map(os.path.expanduser, names) if _exists(name)), None)


def _exists(name: str) -> bool:
    return "\0" not in name and os.path.isfile(name)


def _holds_picture(path: Path) -> bool:
    """Return True for a picture, whatever its name, a damaged one too."""
    try:
        read_picture(path, str(path))
    except BadSample as bad:
        return bad.fault.cause != "not an image"  # a damaged picture is named where it is read
    return True
