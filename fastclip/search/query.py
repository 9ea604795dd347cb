"""What is searched for: texts and pictures with weights, added and subtracted."""

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

__all__ = ["Term", "combine", "parse_query", "parse_texts", "reading"]

_CANCELLED = 1e-5  # length of a sum in units of its weights, below which rounding alone decides its direction
_SHORTEST, _LONGEST = (float(limit) for limit in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))

_NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)"
_QUOTED = re.compile(r'"([^"]*)"')
# An operator is a word of its own ("semi-trailer" is a word), outside of quotes.
_PIECE = re.compile(rf'(?<!\S)(?:(?P<operator>[+-])|(?:{_NUMBER}:)?"[^"]*")(?!\S)')
_WEIGHTED = re.compile(rf"({_NUMBER}):(\S.*)", re.DOTALL)  # "10: a film" is a text
_PATH = re.compile(r"(/|\./|\.\./|~/|file://|[a-z]:\\)", re.IGNORECASE)
# What a file's name ends in that is meant to be a picture, whether it can be read or not
_SUFFIXES = PICTURE_SUFFIXES | {".jfif", ".jif", ".jpe", ".dib", ".ico", ".tga", ".heic", ".heif"}
_DOUBTFUL = re.compile(rf"{_NUMBER}\s*:.*|[^\s/]*/\S*|\S*\w\.\w{{2,4}}|.*\"", re.DOTALL)


class Term(NamedTuple):
    """A text, or a picture's path, and its weight, which is negative where it is subtracted."""

    weight: float
    text: str = ""
    path: Path | None = None


def parse_query(query: str, *, add: Sequence[str] = (), subtract: Sequence[str] = ()) -> list[Term]:
    """``"2:golden retriever + ./pool.jpg - fruit"`` as three terms.

    ``+`` and ``-`` are operators where white space is around them. ``2:`` or ``0.5:`` directly before a term is its
    weight, unless a digit follows (``16:9 screenshot`` is a text) that begins no picture's name (``2:001.jpg``). A term
    in double quotes is a text as it stands.

    A term that names a file is a picture: by its place (``/``, ``./``, ``../``, ``~/``, ``file://``, ``C:\\``), by the
    ending of a picture's name, or else by what the file holds. A query that is the path of a file as a whole is no
    mixture.

    Args:
        add: more terms, which are not looked at for operators.
        subtract: likewise.

    Raises:
        ValueError: a term is empty or not UTF-8, or the file that it names is not there.
    """
    signed = [(1, query)] if _is_file(query) else _signed(query)
    signed += [(1, text) for text in add] + [(-1, text) for text in subtract]
    return [_picture(*_term(sign, text, query)) for sign, text in signed]


def parse_texts(query: str) -> list[Term]:
    """As `parse_query`, all terms being texts: of who may not name files."""
    return [_term(sign, text, query)[0] for sign, text in _signed(query)]


def reading(query: str, terms: Sequence[Term]) -> str:
    """How the terms were read, in a line: "" of a query that can be read in one way only."""
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
    if not _SHORTEST <= length <= _LONGEST:
        raise ValueError("the query has no finite vector: is a weight too large or too small, or the model damaged?")
    return total.astype(np.float32)


def _signed(query: str) -> list[tuple[int, str]]:
    """Texts with the signs before them; the first is added where it has none."""
    found, sign, start = list[tuple[int, str]](), 1, 0
    for match in _PIECE.finditer(query):
        if match["operator"]:
            if found or query[start : match.start()].strip():
                found.append((sign, query[start : match.start()]))
            elif start:  # the second operator before the first term
                found.append((sign, ""))
            sign, start = (1 if match["operator"] == "+" else -1), match.end()
    return [*found, (sign, query[start:])]


def _term(sign: int, text: str, query: str) -> tuple[Term, bool]:
    """And whether it is quoted: a text, whatever it names."""
    weight, text = _weighted(text.strip())
    if quoted := _QUOTED.fullmatch(text):
        text = quoted[1].strip()
    if not text:
        raise ValueError(f"the query {query!r} has an empty term")
    return Term(sign * weight, text), quoted is not None


def _weighted(text: str) -> tuple[float, str]:
    match = _WEIGHTED.fullmatch(text)
    if match is None or (match[2][0].isdigit() and not _is_path(match[2])):
        return 1.0, text
    return float(match[1]), match[2]


def _picture(term: Term, quoted: bool) -> Term:
    """The term, as a picture where its text is the path of one."""
    path = None if quoted else _file(term.text)
    if not quoted and re.match("https?://", term.text):
        raise ValueError(f"{term.text}: a picture to search by must be a file; save it first")
    if path is not None and (_is_path(term.text) or _holds_picture(path)):
        return Term(term.weight, path=path)
    if not quoted and _is_path(term.text):
        raise ValueError(f'there is no picture {term.text} to search by; a text of this name stands in "quotes"')
    try:
        term.text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the query {term.text!r} is neither UTF-8 nor the name of a file") from error
    return term


def _is_path(text: str) -> bool:
    """Whether nothing but a picture's path can be meant."""
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
    """Of a file whose name does not tell."""
    try:
        read_picture(path, str(path))
    except BadSample as bad:
        return bad.fault.cause != "not an image"  # a damaged picture is named where it is read
    return True


def _is_file(query: str) -> bool:
    return _file(_weighted(query.strip())[1]) is not None
