"""Retrieval by a picture and words, added and subtracted: ``bus.jpg + "at night" - rain``.

Jia et al. 2021 (ALIGN), section 6: the query is the sum of the unit vectors of its pictures and texts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastclip.data.picture import PICTURE_SUFFIXES, read_picture
from fastclip.data.source import Source
from fastclip.data.subset import Subset
from fastclip.evaluation.captioned import by_picture, picture_features
from fastclip.evaluation.features import FeatureStore, text_features
from fastclip.evaluation.retrieval import best_ranks, recall, top_items
from fastclip.models.embedder import Embedder
from fastclip.reading import read_lines
from fastclip.search.query import combine

__all__ = ["Answer", "Composed", "Query", "Term", "compose", "parse_query", "read_queries", "unit_sum"]

_TERM = re.compile(
    r"\s*(?:(?P<sign>[+-])\s+)?(?:(?P<weight>\d+(?:\.\d*)?|\.\d+):(?=\S))?"
    r'(?:"(?P<quoted>[^"]+)"|(?P<plain>(?![+-](?:\s|$))[^\s"].*?))\s*(?=\s[+-](?:\s|$)|$)'
)


class Term(NamedTuple):
    """A picture or a text of a query."""

    weight: float  # negative where it is subtracted
    text: str
    quoted: bool  # is a text, whatever its name


class Query(NamedTuple):
    """A line of a file of queries."""

    line: str
    terms: tuple[Term, ...]
    target: str | None = None  # key of the picture that should be found


class Answer(NamedTuple):
    """The pictures most similar to a query, the best first, and where the target is."""

    query: Query
    found: list[tuple[int, float]]  # place in `Composed.source`, cosine
    rank: int | None  # how many pictures are at least as similar as the target; None without one


class Composed(NamedTuple):
    """What `compose` found."""

    answers: list[Answer]
    source: Subset  # the pictures that can be used, each once
    metrics: dict[str, float]  # ``composed_retrieval_recall@K``, of the queries that have a target
    skipped: int  # pictures that cannot be used
    stores: tuple[FeatureStore, ...]  # to `clear` when the result is written


def parse_query(line: str) -> Query:
    """``2:dog + beach.jpg - "at night" => target.jpg``: terms between `` + `` and `` - ``, each perhaps with a weight.

    Signs stand between blanks: ``t-shirt`` is a word. A weight stands directly before its term, and no digit follows
    it that begins no picture's name: ``16:9 screenshot`` is a text. What is quoted is a text as it stands. The part
    from ``=>`` on, which may be left out, is the picture that should be found.

    Raises:
        ValueError: a term is empty, or a quote is not closed, or there is no target after ``=>``.
    """
    line = line.strip()
    told, arrow, target = re.fullmatch(r'(.*?)(?:(?<!\S)(=>)(?!\S)([^"]*))?', line, re.DOTALL).groups()  # type: ignore[union-attr]
    if arrow and not target.strip():
        raise ValueError(f"{line}: there is no picture after =>")
    told = told.rstrip()
    terms: list[Term] = []
    place = 0
    while place < len(told) or not terms:
        match = _TERM.match(told, place)
        if match is None:
            raise ValueError(f"{line}: a term is empty, or a quote is not closed, at {told[place:]!r}")
        weight, text = float(match["weight"] or 1), match["quoted"] or match["plain"]
        if match["weight"] and match["plain"] and text[0].isdigit() and not _is_picture(text):
            weight, text = 1.0, f"{match['weight']}:{text}"
        terms.append(Term(-weight if match["sign"] == "-" else weight, text, match["quoted"] is not None))
        place = match.end()
    return Query(line, tuple(terms), target.strip() if arrow else None)


def read_queries(path: str | Path) -> list[Query]:
    """One a line (`parse_query`); blank lines and those that begin with # are left out.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is no query, with its number; or there is none.
    """
    queries = []
    for number, line in enumerate(read_lines(path), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                queries.append(parse_query(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not queries:
        raise ValueError(f"{path}: there is no query")
    return queries


def compose(
    embedder: Embedder,
    source: Source,
    queries: Sequence[Query],
    *,
    top: int = 10,
    batch_size: int = 256,
    workers: int = 0,
    folder: Path | None = None,
    progress: bool = False,
) -> Composed:
    """The pictures of a source that are most similar to each query, without those that the query names.

    A term is a picture of the source where it is the key of one, or the end of just one key from a ``/`` on; else the
    picture of a file of this name; else a text.

    Args:
        top: pictures of an answer.
        batch_size, workers, progress: as of `image_features`.
        folder: as of `FeatureStore`.

    Raises:
        ValueError: `top` is below 1, a term has the name of a picture and none is found, or a target; a query's
            terms have no sum, as of `unit_sum`; and as `image_features` does.
    """
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    pictures, _, skipped = by_picture(source)
    meant = _Meanings([pictures.key(k) for k in range(len(pictures))], queries)
    terms = {term: meant.of_term(term) for query in queries for term in query.terms}
    targets = [meant.target(query) for query in queries]
    words = list(dict.fromkeys(meaning for meaning in terms.values() if isinstance(meaning, str)))
    vectors: dict[int | str | Path, Tensor] = dict(zip(words, text_features(embedder, words, batch_size=batch_size)))
    for file in {meaning for meaning in terms.values() if isinstance(meaning, Path)}:
        vectors[file] = embedder.embed_images(embedder.transform(read_picture(file, str(file)))[None])[0]
    images, store = picture_features(
        embedder, pictures, folder=folder, batch_size=batch_size, workers=workers, progress=progress
    )
    used = {place: k for k, place in enumerate(images.indices.tolist())}
    for place in {place for place in (*terms.values(), *targets) if isinstance(place, int)}:
        if place not in used:
            raise ValueError(f"{pictures.key(place)}, which a query names, cannot be used")
        vectors[place] = images.features[used[place]]
    answers = []
    for query, target in zip(queries, targets):
        meanings = [terms[term] for term in query.terms]
        try:
            vector = unit_sum([vectors[meaning] for meaning in meanings], [term.weight for term in query.terms])
        except ValueError as error:
            raise ValueError(f"{query.line}: {error}") from error
        own = [used[meaning] for meaning in meanings if isinstance(meaning, int)]
        answers.append(_answer(query, vector, images.features, own, None if target is None else used[target], top))
    ranks = torch.tensor([answer.rank for answer in answers if answer.rank is not None])
    metrics = {f"composed_retrieval_recall@{k}": recall(ranks, k) for k in (1, 5, 10)} if len(ranks) else {}
    usable = Subset(source, [pictures.indices[place] for place in used])
    return Composed(answers, usable, metrics, skipped + len(pictures) - len(used), (store,))


def unit_sum(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The unit vector (D,) of the weighted sum of unit vectors (D,); errors as of `fastclip.search.query.combine`."""
    total = torch.from_numpy(combine([vector.numpy() for vector in vectors], weights)).double()
    return (total / total.norm()).float()  # in float32 squares of large weights overflow


def _answer(query: Query, vector: Tensor, features: Tensor, own: list[int], target: int | None, top: int) -> Answer:
    """`own`: the pictures that the query names, which are no answers."""
    others = torch.ones(len(features), dtype=torch.bool)
    others[own] = False
    places = others.nonzero().flatten()
    if not len(places):
        raise ValueError(f"{query.line}: the query names all pictures")
    scores, found = (x[0].tolist() for x in top_items(vector[None], features[places], top))
    rank = None
    if target is not None:
        pair = torch.tensor([[0, int((places < target).sum())]])
        rank = int(best_ranks(vector[None], features[places], pair))
    return Answer(query, [(int(places[k]), score) for k, score in zip(found, scores)], rank)


class _Meanings:
    """What the names in queries mean: the number of a picture of the data, a file, or a text."""

    def __init__(self, keys: Iterable[str], queries: Sequence[Query]) -> None:
        names = {term.text for query in queries for term in query.terms if not term.quoted}
        names |= {query.target for query in queries if query.target is not None}
        wanted = {spelled for name in names for spelled in _spellings(name)}
        self._exact: dict[str, int] = {}
        self._ends: dict[str, list[int]] = {}
        for number, key in enumerate(keys):
            for whole in wanted.intersection(_spellings(key)):
                self._exact[whole] = number
            end = key
            while "/" in end:
                end = end.partition("/")[2]
                if end in names:
                    self._ends.setdefault(end, []).append(number)

    def of_term(self, term: Term) -> int | str | Path:
        if term.quoted:
            return term.text
        place = self._place(term.text)
        if place is not None:
            return place
        if not _is_picture(term.text):
            return term.text
        if not os.path.isfile(term.text):
            text = "write a text of this name in quotes"
            raise ValueError(f"{term.text} is neither a picture of the data nor a file; {text}")
        return Path(term.text)

    def target(self, query: Query) -> int | None:
        if query.target is None:
            return None
        place = self._place(query.target)
        if place is None:
            raise ValueError(f"{query.line}: {query.target} is no picture of the data")
        if any(self.of_term(term) == place for term in query.terms):
            raise ValueError(f"{query.line}: the query names the picture that it should find")
        return place

    def _place(self, name: str) -> int | None:
        for spelled in _spellings(name):
            if spelled in self._exact:
                return self._exact[spelled]
        ends = self._ends.get(name, [])
        if len(ends) > 1:
            raise ValueError(f"{name} is the name of {len(ends)} pictures: write more of its path")
        return ends[0] if ends else None


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES


def _spellings(name: str) -> tuple[str, ...]:
    """What names the same picture; a text is no path, and may be too long for one."""
    return (name, os.path.abspath(name), os.path.realpath(name)) if "\0" not in name else (name,)
