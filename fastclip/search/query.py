"""What is searched for: texts and pictures with weights, added and subtracted."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastclip.data.picture import PICTURE_SUFFIXES

__all__ = ["Term", "combine", "parse_query", "parse_texts"]

_OPERATOR = re.compile(r"(?<!\S)([+-])(?!\S)")  # a word of its own: "semi-trailer" is a word
_WEIGHTED = re.compile(r"(\d+\.?\d*|\.\d+):(.+)", re.DOTALL)
_PATH = re.compile(r"(/|\./|\.\./|~/|file://|[a-z]:\\)", re.IGNORECASE)


class Term(NamedTuple):
    """A text, or a picture's path, and its weight, which is negative where it is subtracted."""

    weight: float
    text: str = ""
    path: Path | None = None


def parse_query(query: str, *, add: Sequence[str] = (), subtract: Sequence[str] = ()) -> list[Term]:
    """``"2:golden retriever + ./pool.jpg - fruit"`` as three terms.

    ``+`` and ``-`` are operators where white space is around them. ``2:`` or ``0.5:`` before a term is its weight. A
    term is a picture where it begins as a path (``/``, ``./``, ``../``, ``~/``, ``file://``, ``C:\\``) or ends as a
    picture's name; a query that is the path of a file as a whole is no mixture.

    Args:
        add: more terms, which are not looked at for operators.
        subtract: likewise.

    Raises:
        ValueError: a term is empty, or the file that it names is not there.
    """
    signed = [(1, query)] if _is_file(query) else _signed(query)
    signed += [(1, text) for text in add] + [(-1, text) for text in subtract]
    return [_picture(_term(sign, text, query)) for sign, text in signed]


def parse_texts(query: str) -> list[Term]:
    """As `parse_query`, all terms being texts: of who may not name files."""
    return [_term(sign, text, query) for sign, text in _signed(query)]


def combine(vectors: Iterable[npt.NDArray[np.float32]], weights: Iterable[float]) -> npt.NDArray[np.float32]:
    """The weighted sum of unit vectors, which is not scaled to length 1, as rclip's: a score is the weighted sum of the
    terms' cosines."""
    with np.errstate(invalid="ignore", over="ignore"):  # a weight may be as large as one likes
        terms = [weight * vector.astype(np.float64) for vector, weight in zip(vectors, weights)]
        return np.sum(terms, axis=0).astype(np.float32)


def _signed(query: str) -> list[tuple[int, str]]:
    """Texts with the signs before them; the first is added where it has none."""
    first, *pieces = _OPERATOR.split(query)
    pieces = pieces if pieces and not first.strip() else ["+", first, *pieces]
    return [(1 if sign == "+" else -1, text) for sign, text in zip(pieces[::2], pieces[1::2])]


def _term(sign: int, text: str, query: str) -> Term:
    weight, text = 1.0, text.strip()
    if match := _WEIGHTED.fullmatch(text):
        weight, text = float(match[1]), match[2].strip()
    if not text:
        raise ValueError(f"the query {query!r} has an empty term")
    return Term(sign * weight, text)


def _picture(term: Term) -> Term:
    """The term, as a picture where its text is the path of one."""
    if re.match("https?://", term.text):
        raise ValueError(f"{term.text}: a picture to search by must be a file; save it first")
    if not (_PATH.match(term.text) or Path(term.text).suffix.lower() in PICTURE_SUFFIXES):
        return term
    path = Path(term.text.removeprefix("file://")).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no picture {term.text} to search by")
    return Term(term.weight, path=path)


def _is_file(query: str) -> bool:
    match = _WEIGHTED.fullmatch(query)
    text = (match[2] if match else query).strip().removeprefix("file://")
    return os.path.isfile(os.path.expanduser(text)) if "\0" not in text else False
