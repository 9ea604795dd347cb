"""A folder that is searched with a model."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fastclip.data.faults import BadSample
from fastclip.embedding.query import Term, combine
from fastclip.search.approximate import Approximate
from fastclip.search.index import Index, Pictures, Vector
from fastclip.search.model import Model
from fastclip.search.rank import top
from fastclip.search.scan import EXCLUDED, Update, digest_of, excluded, prepared, update_index
from fastclip.system import env

__all__ = ["Match", "SearchEngine"]

logger = logging.getLogger(__name__)
_EXACT = 1_000_000  # contents up to which every vector is gone through


class Match(NamedTuple):
    """A file that a query finds."""

    path: str
    score: float
    content: int = -1  # its number in the index, which stays


class SearchEngine:
    """Finds pictures under a folder by text, by picture, or by a mixture of these.

    A text that was searched for before, and a picture that is indexed, need no model. May be used by several threads.

    Args:
        exclude: names of folders that are left out, whatever is in the index.
        indices: where the indices lie; default: FASTCLIP_CACHE.
        exact_limit: pictures above which usearch finds the candidates, whose scores are then exact.

    Raises:
        NotADirectoryError: `folder` is none.
        ValueError: the index is of another version; and as `model`, where its identity is not known yet.
    """

    def __init__(
        self,
        model: Model,
        folder: str | Path,
        *,
        exclude: Collection[str] = EXCLUDED,
        indices: Path | None = None,
        exact_limit: int = _EXACT,
    ) -> None:
        if not os.path.isdir(folder):
            raise NotADirectoryError(f"there is no folder {folder}")
        self.folder = os.path.realpath(folder)
        self._bytes, self._exclude = os.fsencode(self.folder), tuple(exclude)
        self._model, self._exact_limit = model, exact_limit
        self._index = Index((indices or env.cache_folder()) / "search" / f"{model.identity}.sqlite3")
        self._lock = threading.RLock()  # SQLite's connection, the model and what is loaded are one thread's at a time
        self._pictures: Pictures | None = None
        self._approximate: Approximate | None = None
        self._changes = -1

    def close(self) -> None:
        self._index.close()

    def update(self, *, batch_size: int = 64, workers: int = 1, progress: bool = False) -> Update:
        """Bring the index up to date with the folder, as `update_index`."""
        with self._lock:
            self._pictures = self._approximate = None
            return update_index(
                self._index,
                self._bytes,
                lambda: self._model.embedder,
                exclude=self._exclude,
                batch_size=batch_size,
                workers=workers,
                progress=progress,
            )

    def faults(self) -> list[tuple[str, str]]:
        """Return the files that cannot be used, and why."""
        left_out = excluded(self._bytes, self._exclude)
        with self._lock:
            faults = self._index.faults(self._bytes)
        return [(os.fsdecode(path), fault) for path, fault in faults if not left_out(path)]

    def find(self, terms: Sequence[Term], count: int = 10) -> list[Match]:
        """The `count` files of the highest scores; pictures of the query are not among them.

        Raises:
            ValueError: a picture of the query cannot be read; or as `combine`.
        """
        paths = [term.path for term in terms if term.path is not None]
        # a link and what it leads to are two files
        asked = {os.path.join(os.path.realpath(path.parent), path.name) for path in paths}
        asked |= {os.path.realpath(path) for path in paths}
        matches = self.find_vector(self.query_vector(terms), count + len(asked))
        return [match for match in matches if match.path not in asked][:count]

    def query_vector(self, terms: Sequence[Term]) -> Vector:
        """(D,), as `combine`."""
        vectors = [self._text(term.text) if term.path is None else self._file(term.path) for term in terms]
        return combine(vectors, [term.weight for term in terms])

    def find_vector(self, query: Vector, count: int = 10) -> list[Match]:
        """Return the `count` files of the highest scores. ValueError where a number of the query is not finite."""
        if not np.isfinite(query).all():
            raise ValueError("the query has no finite vector: is the model damaged?")
        with self._lock:
            pictures = self._loaded()
            if pictures.vectors.size and pictures.vectors.shape[1] != len(query):
                raise ValueError(f"{self._index.file} holds vectors of another length; remove it to begin anew")
            if self._approximate is None:
                best = top(pictures, query, count)
            else:
                best = self._nearest(self._approximate, pictures, query, count)
            if not all(math.isfinite(score) for _, score, _ in best):
                raise ValueError(f"{self._index.file} holds a vector that is not finite; remove it to begin anew")
        return [Match(os.fsdecode(path), score, content) for path, score, content in best]

    def count(self) -> int:
        """Return how many files can be found."""
        with self._lock:
            return len(self._loaded().paths)

    def paths_of(self, content: int) -> list[str]:
        """The files of this content that can be found."""
        with self._lock:
            pictures = self._loaded()
        places = np.flatnonzero(pictures.contents[pictures.rows] == content)
        return [os.fsdecode(pictures.paths[place]) for place in places]

    def picture_vector(self, file: BinaryIO, key: str) -> Vector:
        """Return the vector (D,) of a picture, from the index where its content is there.

        Raises:
            BadSample: it cannot be read; with `key`.
        """
        with self._lock:
            known = self._index.vector_of_digest(digest_of(file))
        if known is not None:
            return known
        import torch

        with self._lock:
            embedder = self._model.embedder
        file.seek(0)
        image, fault = prepared(file, key, embedder.transform)
        if image is None:
            raise BadSample("unusable picture", key, fault or "")
        with self._lock:
            return embedder.embed_images(torch.stack([image]))[0].numpy()

    def _text(self, text: str) -> Vector:
        with self._lock:
            if (known := self._index.vector_of_text(text)) is not None:
                return known
            embedder = self._model.embedder
            if _is_cut(embedder.tokenize, text):
                logger.warning("the end of the text is not read, for which the model has no room: %.60s ...", text)
            vector: Vector = embedder.embed_texts([text])[0].numpy()
            try:
                self._index.keep_text(text, vector)
            except OSError as error:  # such as an index that may be read only
                logger.warning("the text is not remembered: %s", error)
            return vector

    def _file(self, path: Path) -> Vector:
        try:
            opened = path.open("rb")
        except OSError as error:
            raise BadSample("unreadable file", str(path), error.strerror or str(error)) from error
        with opened as file:
            return self.picture_vector(file, str(path))

    def _loaded(self) -> Pictures:
        """Return what is searched, read again where another process has changed it, and set `_approximate`."""
        if self._pictures is not None and self._changes == self._index.changes():
            return self._pictures
        self._changes = self._index.changes()
        left_out = excluded(self._bytes, self._exclude)
        self._approximate = None
        if self._index.count(self._bytes) > self._exact_limit:
            self._approximate = Approximate(self._index)
            logger.warning(
                "approximate search of %d pictures: it finds %.1f %% of the 10 nearest",
                len(self._approximate),
                100 * self._approximate.recall,
            )
            files = [(path, content) for path, content in self._index.paths(self._bytes) if not left_out(path)]
            rows = np.fromiter((content for _, content in files), np.int64, len(files))
            contents, rows = np.unique(rows, return_inverse=True)
            nothing = np.empty((len(contents), 0), np.float32)  # vectors are read for the candidates of a query alone
            self._pictures = Pictures([path for path, _ in files], rows, contents, nothing)
        else:
            pictures = self._index.pictures(self._bytes)
            kept = [place for place, path in enumerate(pictures.paths) if not left_out(path)]
            self._pictures = pictures._replace(paths=[pictures.paths[k] for k in kept], rows=pictures.rows[kept])
        return self._pictures

    def _nearest(
        self, graph: Approximate, pictures: Pictures, query: Vector, count: int
    ) -> list[tuple[bytes, float, int]]:
        """Ask the graph, which holds other folders' contents too, for more until enough are of this folder."""
        asked = count
        while True:
            ids = np.intersect1d(graph.nearest(query, asked), pictures.contents)
            if len(ids) >= count or asked >= len(graph):
                break
            asked *= 4  # the graph cannot leave other folders out by itself
        vectors = np.empty((len(ids), len(query)), np.float32)
        for row, content in enumerate(ids):
            vectors[row] = self._index.vector_of(int(content))
        rows = np.searchsorted(pictures.contents, ids)
        places = np.flatnonzero(np.isin(pictures.rows, rows))
        paths = [pictures.paths[place] for place in places]
        few = Pictures(paths, np.searchsorted(rows, pictures.rows[places]), ids, vectors)
        return top(few, query, count)


def _is_cut(tokenize: Any, text: str) -> bool:
    """Return True if neither the text's last character nor what would follow makes a difference.

    In a text without tokens neither does, although there is room.
    """
    cut, whole, more, nothing = tokenize([text[:-1], text, text + text, ""])
    return bool((cut == whole).all() and (whole == more).all() and (whole != nothing).any())
