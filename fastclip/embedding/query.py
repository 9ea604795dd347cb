"""Queries: texts and images with weights, added and subtracted.

``fastclip search`` and ``fastclip eval compose`` share this grammar. A query consists of terms joined by ``+`` and
``-``, which are operators if they are surrounded by white space and not quoted. ``2:`` or ``0.5:`` directly before a
term is its weight. If the term begins with a digit, the number before the colon is a weight only if the term is the
name of an image (``2:001.jpg``), so that ``16:9 screenshot`` is a text. A term in double quotes is taken literally as a
text.
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

# Minimum length of a sum of vectors, relative to the sum of the weights' absolute values. Rounding errors determine the
# direction of a shorter sum.
_CANCELLED = 1e-5
_MIN_LENGTH, _MAX_LENGTH = (float(limit) for limit in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))

_NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)"
_QUOTED = re.compile(r'"([^"]*)"')
# An operator is surrounded by white space ("semi-trailer" contains none) and not quoted.
_WORD = re.compile(rf'(?<!\S)(?:(?P<operator>[+-]|=>)|(?:{_NUMBER}:)?"[^"]*")(?!\S)')
_WEIGHTED = re.compile(rf"({_NUMBER}):(\S.*)", re.DOTALL)  # "10: a film" is a text
_PATH = re.compile(r"(/|\./|\.\./|~/|file://|[a-z]:\\)", re.IGNORECASE)
# Suffixes of names that are meant to be images, even if the format cannot be read
_SUFFIXES = PICTURE_SUFFIXES | {".jif", ".dib", ".ico", ".tga"}
# Texts that may have been meant differently: "3 : 2", "dir/photo", "photo.png", a stray quote
_DOUBTFUL = re.compile(rf"{_NUMBER}\s*:.*|[^\s/]*/\S*|\S*\w\.\w{{2,4}}|.*\"", re.DOTALL)


class Term(NamedTuple):
    """A text or the path of an image, with its weight, which is negative for a subtracted term."""

    weight: float
    text: str = ""
    path: Path | None = None
    quoted: bool = False  # the text was quoted, so it never names an image


def parse_query(query: str, *, add: Sequence[str] = (), subtract: Sequence[str] = ()) -> list[Term]:
    """Parse a query such as ``"2:golden retriever + ./pool.jpg - fruit"``, which has three terms.

    Args:
        query: the query. A term is an image if `picture_path` finds its file.
        add: further terms to add, in which operators are not interpreted.
        subtract: further terms to subtract, in which operators are not interpreted.

    Raises:
        ValueError: a term is empty or badly quoted (`parse_texts`), names an image that does not exist
            (`picture_path`), or is not UTF-8.
    """
    terms = parse_terms(query)
    terms += [_term(1, text, query) for text in add] + [_term(-1, text, query) for text in subtract]
    return [_picture(term) for term in terms]


def parse_terms(query: str) -> list[Term]:
    """Parse a query like `parse_texts`, but as a single term if the whole query is the path of a file."""
    is_file = _file(_weighted(query.strip())[1]) is not None
    return [_term(1, query, query)] if is_file else parse_texts(query)


def parse_texts(query: str) -> list[Term]:
    """Parse a query in which every term is a text, for callers that must not name files.

    Raises:
        ValueError: a term is empty, or begins with a quote that is not closed at its end. The message names the query.
    """
    (_, first), *others = split_at(query, "+", "-")
    signed = [(1, first)] if first.strip() or not others else []  # empty if the query begins with an operator
    signed += [(-1 if operator == "-" else 1, text) for operator, text in others]
    return [_term(sign, text, query) for sign, text in signed]


def split_at(query: str, *operators: str) -> list[tuple[str, str]]:
    """Split a query at operators, such as ``+``, which are separate words outside of quotes.

    Returns:
        The pieces in order, each with the operator in front of it ("" for the first piece).
    """
    parts, operator, start = list[tuple[str, str]](), "", 0
    for match in _WORD.finditer(query):
        if (word := match["operator"]) and word in operators:
            parts.append((operator, query[start : match.start()]))
            operator, start = word, match.end()
    return [*parts, (operator, query[start:])]


def picture_path(text: str) -> Path | None:
    """Return the path of the image that a term names, or None if the term is a text.

    A term names an image if it begins like a path (``/``, ``./``, ``../``, ``~/``, ``file://``, ``C:\\``), if it ends
    in the suffix of an image, or if an image file of this name exists.

    Raises:
        ValueError: the term can only be an image, but the file does not exist; or it is the address of a web page.
    """
    if re.match("https?://", text):
        raise ValueError(f"{text}: an image to search by must be a local file: download it first")
    path = _file(text)
    if path is None and _is_path(text):
        raise ValueError(f'there is no image {text} to search by; if it is meant as a text, put it in "quotes"')
    return path if path is not None and (_is_path(text) or _holds_picture(path)) else None


def reading(query: str, terms: Sequence[Term]) -> str:
    """Describe in one line how the terms were understood, or return "" if the query is unambiguous."""
    if len(terms) == 1 and terms[0].weight == 1:
        text = query.strip()
        if terms[0].path is None and terms[0].text == text and not _DOUBTFUL.fullmatch(text):
            return ""
        if terms[0].path is not None and _is_path(text):
            return ""
    return " ".join(
        f"{'-' if term.weight < 0 else '+'} {abs(term.weight):g} * "
        + (f"text {json.dumps(term.text, ensure_ascii=False)}" if term.path is None else f"image {term.path}")
        for term in terms
    )


def combine(vectors: Iterable[npt.NDArray[np.float32]], weights: Iterable[float]) -> npt.NDArray[np.float32]:
    """Return the weighted sum (D,), float32, of unit vectors (D,).

    The sum is not scaled to unit length, so that a score is the weighted sum of the terms' cosines. The command-line
    tool rclip scores images in the same way.

    Raises:
        ValueError: a weight is not finite, the terms cancel each other, or the sum is out of the range of float32.
    """
    weights = list(weights)
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights must be finite numbers, got {', '.join(f'{weight:g}' for weight in weights)}")
    with np.errstate(invalid="ignore", over="ignore"):  # weights are not limited; an overflow is reported below
        total = np.sum([weight * vector.astype(np.float64) for vector, weight in zip(vectors, weights)], axis=0)
    length = math.hypot(*total.tolist())  # squaring the elements could overflow or underflow
    if length <= sum(_CANCELLED * abs(weight) for weight in weights):
        raise ValueError("the terms of the query cancel each other: nothing is left to search for")
    if not _MIN_LENGTH <= length <= _MAX_LENGTH:
        raise ValueError(
            "the query's vector is too short, too long or not finite: use weights closer to 1, or check the model"
        )
    return total.astype(np.float32)


def _term(sign: int, text: str, query: str) -> Term:
    weight, text = _weighted(text.strip())
    quoted = _QUOTED.fullmatch(text)
    if quoted is None and text.startswith('"'):
        # Accepting the term as a text would hide a missing quote or operator.
        raise ValueError(f"the query {query!r} has a quote that is not closed, or a word next to a quote, at {text!r}")
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
    """Return the term, as an image if its text names one."""
    if not term.quoted and (path := picture_path(term.text)) is not None:
        return Term(term.weight, path=path)
    try:
        term.text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the term {term.text!r} is neither UTF-8 nor the name of a file") from error
    return term


def _is_path(text: str) -> bool:
    """Return True if the text can only be the path of an image."""
    return _PATH.match(text) is not None or os.path.splitext(text)[1].lower() in _SUFFIXES


def _file(text: str) -> Path | None:
    """Return the path of the file with this name or ``file://`` address, or None if it does not exist."""
    names = [text]
    if text.lower().startswith("file://"):
        names = [text[7:], unquote(text[7:])]  # addresses copied from other programs have %20 for a space
    return next((Path(name) for name in map(os.path.expanduser, names) if _exists(name)), None)


def _exists(name: str) -> bool:
    return "\0" not in name and os.path.isfile(name)


def _holds_picture(path: Path) -> bool:
    """Return True if the file is an image by its contents, even a damaged one."""
    try:
        read_picture(path, str(path))
    except BadSample as bad:
        return bad.fault.cause != "not an image"  # a damaged image is reported later, when it is embedded
    return True
