"""Retrieval by a picture and words, added and subtracted: ``bus.jpg + "at night" - rain``.

Jia et al. 2021 (ALIGN), section 6: the query is the sum of the unit vectors of its pictures and texts.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastclip.data.picture import read_picture
from fastclip.data.source import Source
from fastclip.data.sources.subset import Subset
from fastclip.embedding.features import FeatureStore, text_features
from fastclip.embedding.query import Term, combine, parse_terms, picture_path, split_at
from fastclip.evaluation.caption_retrieval import by_picture, picture_features
from fastclip.evaluation.retrieval import best_ranks, recall, top_items
from fastclip.models.embedder import Embedder
from fastclip.system.reading import read_lines

__all__ = ["Answer", "Composed", "Query", "compose", "parse_query", "read_queries", "unit_sum"]


class Query(NamedTuple):
    """A line of a file of queries."""

    line: str
    terms: tuple[Term, ...]
    target: str | None = None  # key of the picture that should be found


class Answer(NamedTuple):
    """The pictures most similar to a query, the best first, and where the target is."""

    query: Query
    pictures: list[tuple[int, float]]  # place in `Composed.source`, cosine
    rank: int | None  # how many pictures are at least as similar as the target; None without one


class Composed(NamedTuple):
    """The answers of `compose`."""

    answers: list[Answer]
    source: Subset  # the pictures that can be used, each once
    metrics: dict[str, float]  # ``composed_retrieval_recall@K``, of the queries that have a target
    skipped: int  # pictures that cannot be used
    stores: tuple[FeatureStore, ...]  # to `clear` when the result is written


def parse_query(line: str) -> Query:
    """``2:dog + beach.jpg - "at night" => target.jpg``: a query of `fastclip.embedding.query`, and perhaps its target.

    Raises:
        ValueError: as `parse_terms`, or there is not one target after ``=>``.
    """
    line = line.strip()
    (_, asked), *targets = split_at(line, "=>")
    target = targets[0][1].strip() if targets else None
    if target == "" or len(targets) > 1:
        raise ValueError(f"{line}: one picture must stand after =>")
    try:
        return Query(line, tuple(parse_terms(asked)), target)
    except ValueError as error:
        raise error if target is None else ValueError(f"{line}: {error}") from error


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

    A term is a picture of the source where it is the key of one, or the end of just one key from a ``/`` on; else what
    it is in `fastclip.embedding.query.picture_path`, the picture of a file or a text.

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
        named = [used[meaning] for meaning in meanings if isinstance(meaning, int)]
        answers.append(_answer(query, vector, images.features, named, None if target is None else used[target], top))
    ranks = torch.tensor([answer.rank for answer in answers if answer.rank is not None])
    metrics = {f"composed_retrieval_recall@{k}": recall(ranks, k) for k in (1, 5, 10)} if len(ranks) else {}
    usable = Subset(source, [pictures.indices[place] for place in used])
    return Composed(answers, usable, metrics, skipped + len(pictures) - len(used), (store,))


def unit_sum(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The unit vector (D,) of the weighted sum of unit vectors (D,); errors as of `combine`."""
    total = torch.from_numpy(combine([vector.numpy() for vector in vectors], weights)).double()
    return (total / total.norm()).float()  # in float32 squares of large weights overflow


def _answer(query: Query, vector: Tensor, features: Tensor, named: list[int], target: int | None, top: int) -> Answer:
    """Search among all pictures but the `named` ones, which the query names."""
    others = torch.ones(len(features), dtype=torch.bool)
    others[named] = False
    places = others.nonzero().flatten()
    if not len(places):
        raise ValueError(f"{query.line}: the query names all pictures")
    scores, best = (x[0].tolist() for x in top_items(vector[None], features[places], top))
    rank = None
    if target is not None:
        pair = torch.tensor([[0, int((places < target).sum())]])
        rank = int(best_ranks(vector[None], features[places], pair))
    return Answer(query, [(int(places[k]), score) for k, score in zip(best, scores)], rank)


class _Meanings:
    """The meaning of names in queries: the number of a picture of the data, a file, or a text."""

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
        return picture_path(term.text) or term.text

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


def _spellings(name: str) -> tuple[str, ...]:
    """Return the names of the same picture; a text is no path, and may be too long for one."""
    return (name, os.path.abspath(name), os.path.realpath(name)) if "\0" not in name else (name,)
