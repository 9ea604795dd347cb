"""Retrieval by combinations of images and texts, added and subtracted: ``bus.jpg + "at night" - rain``.

As in Jia et al. 2021 (ALIGN), section 6, the query is the sum of the unit vectors of its images and texts.
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
    """A query, as read from one line of a file."""

    line: str
    terms: tuple[Term, ...]
    target: str | None = None  # key of the image that the query should retrieve


class Answer(NamedTuple):
    """Images most similar to a query, the best first, and the rank of its target."""

    query: Query
    pictures: list[tuple[int, float]]  # index in `Composed.source`, cosine
    rank: int | None  # number of other images that are at least as similar as the target; None without a target


class Composed(NamedTuple):
    """Results of `compose`."""

    answers: list[Answer]
    source: Subset  # usable images, each once
    metrics: dict[str, float]  # ``composed_retrieval_recall@K`` over the queries with a target
    skipped: int  # number of images that cannot be used
    stores: tuple[FeatureStore, ...]  # stores to `clear` once the result is written


def parse_query(line: str) -> Query:
    """Parse a line such as ``2:dog + beach.jpg - "at night" => target.jpg``.

    The part before ``=>`` is a query in the grammar of `fastclip.embedding.query`. The target after it is optional.

    Raises:
        ValueError: the query is invalid (`parse_terms`), or ``=>`` is not followed by exactly one target.
    """
    line = line.strip()
    (_, asked), *targets = split_at(line, "=>")
    target = targets[0][1].strip() if targets else None
    if target == "" or len(targets) > 1:
        raise ValueError(f"{line}: => must be followed by exactly one image")
    try:
        return Query(line, tuple(parse_terms(asked)), target)
    except ValueError as error:
        raise error if target is None else ValueError(f"{line}: {error}") from error


def read_queries(path: str | Path) -> list[Query]:
    """Read a file with one query per line (`parse_query`), ignoring blank lines and lines that begin with #.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not a valid query, or the file contains no query. The message names the line.
    """
    queries = []
    for number, line in enumerate(read_lines(path), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                queries.append(parse_query(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not queries:
        raise ValueError(f"{path}: the file contains no query")
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
    """Retrieve the images of a source that are most similar to each query.

    Images that a query names are excluded from its answer. A term refers to an image of the source if it equals the
    image's key, or the last path components of exactly one key. Any other term is an image file or a text, as decided
    by `fastclip.embedding.query.picture_path`.

    Args:
        embedder: model to embed images and texts with.
        source: dataset to search.
        queries: the queries.
        top: number of images per answer.
        batch_size, workers, progress: as in `image_features`.
        folder: folder for the progress (default: FASTCLIP_CACHE).

    Raises:
        ValueError: `top` is below 1, a named image or target does not exist or cannot be used, the terms of a query
            cancel each other or their sum is out of range (`unit_sum`), or no image can be used.
        OSError: a file of the source cannot be read.
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
            raise ValueError(f"the image {pictures.key(place)}, which a query names, cannot be used")
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
    """Return the weighted sum of unit vectors (D,), normalised, with the errors of `combine`."""
    total = torch.from_numpy(combine([vector.numpy() for vector in vectors], weights)).double()
    return (total / total.norm()).float()  # the norm is computed in float64, as squares of large weights overflow


def _answer(query: Query, vector: Tensor, features: Tensor, named: list[int], target: int | None, top: int) -> Answer:
    """Search among all images except those that the query names (`named`)."""
    others = torch.ones(len(features), dtype=torch.bool)
    others[named] = False
    places = others.nonzero().flatten()
    if not len(places):
        raise ValueError(f"{query.line}: the query names all images, so none is left to search")
    scores, best = (x[0].tolist() for x in top_items(vector[None], features[places], top))
    rank = None
    if target is not None:
        pair = torch.tensor([[0, int((places < target).sum())]])
        rank = int(best_ranks(vector[None], features[places], pair))
    return Answer(query, [(int(places[k]), score) for k, score in zip(best, scores)], rank)


class _Meanings:
    """Resolve names in queries to the number of an image in the dataset, to a file, or to a text."""

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
            raise ValueError(f"{query.line}: the target {query.target} is not an image of the dataset")
        if any(self.of_term(term) == place for term in query.terms):
            raise ValueError(f"{query.line}: the query must not name its target")
        return place

    def _place(self, name: str) -> int | None:
        for spelled in _spellings(name):
            if spelled in self._exact:
                return self._exact[spelled]
        ends = self._ends.get(name, [])
        if len(ends) > 1:
            raise ValueError(f"{name} is the name of {len(ends)} images: give more of the path")
        return ends[0] if ends else None


def _spellings(name: str) -> tuple[str, ...]:
    """Return a name with its absolute and its real path; a text with a null character has no paths."""
    return (name, os.path.abspath(name), os.path.realpath(name)) if "\0" not in name else (name,)
