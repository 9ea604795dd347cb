"""Search of a folder with a model."""

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
_EXACT = 1_000_000  # largest number of files for which every vector is compared with a query


class Match(NamedTuple):
    """A file found by a query."""

    path: str
    score: float
    content: int = -1  # id of the file's content in the index, which never changes


class SearchEngine:
    """Search of the images under a folder by text, by image, or by a mixture of both.

    The model is not loaded for texts that were searched for before and for images that are indexed. Several threads may
    use one engine.

    Args:
        model: model that computes the vectors.
        folder: folder to search.
        exclude: names of folders that are left out, even if the index has their files.
        indices: folder of the indices (default: FASTCLIP_CACHE).
        exact_limit: number of files above which usearch selects the candidates. Their scores are exact in any case.

    Raises:
        NotADirectoryError: `folder` is not a folder.
        ValueError: the index was written by another version, or `model` raises it.
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
        self._lock = threading.RLock()  # one thread at a time uses SQLite, the model and the loaded index
        self._pictures: Pictures | None = None
        self._approximate: Approximate | None = None
        self._changes = -1

    def close(self) -> None:
        """Close the index."""
        self._index.close()

    def update(self, *, batch_size: int = 64, workers: int = 1, progress: bool = False) -> Update:
        """Bring the index up to date with the folder; arguments and errors are those of `update_index`."""
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
        """Return the path and the reason of each file that cannot be used."""
        left_out = excluded(self._bytes, self._exclude)
        with self._lock:
            faults = self._index.faults(self._bytes)
        return [(os.fsdecode(path), fault) for path, fault in faults if not left_out(path)]

    def find(self, terms: Sequence[Term], count: int = 10) -> list[Match]:
        """Return the `count` files with the highest scores, without the images of the query itself.

        Raises:
            ValueError: an image of the query cannot be read, or `combine` raises it.
        """
        paths = [term.path for term in terms if term.path is not None]
        # a link and its target are two different files, so both are left out
        asked = {os.path.join(os.path.realpath(path.parent), path.name) for path in paths}
        asked |= {os.path.realpath(path) for path in paths}
        matches = self.find_vector(self.query_vector(terms), count + len(asked))
        return [match for match in matches if match.path not in asked][:count]

    def query_vector(self, terms: Sequence[Term]) -> Vector:
        """Return the combined vector (D,) of a query; errors are those of `find`."""
        vectors = [self._text(term.text) if term.path is None else self._file(term.path) for term in terms]
        return combine(vectors, [term.weight for term in terms])

    def find_vector(self, query: Vector, count: int = 10) -> list[Match]:
        """Return the `count` files with the highest scores <query, vector>.

        Raises:
            ValueError: the query is not finite or has another length than the vectors of the index, or the index is
                damaged.
        """
        if not np.isfinite(query).all():
            raise ValueError("the vector of the query is not finite: the model may be damaged")
        with self._lock:
            pictures = self._loaded()
            if pictures.vectors.size and pictures.vectors.shape[1] != len(query):
                raise ValueError(
                    f"{self._index.file} holds vectors of another length: remove it, and the index is rebuilt"
                )
            if self._approximate is None:
                best = top(pictures, query, count)
            else:
                best = self._nearest(self._approximate, pictures, query, count)
            if not all(math.isfinite(score) for _, score, _ in best):
                raise ValueError(
                    f"{self._index.file} holds a vector that is not finite: remove it, and the index is rebuilt"
                )
        return [Match(os.fsdecode(path), score, content) for path, score, content in best]

    def count(self) -> int:
        """Return the number of files that a query can find."""
        with self._lock:
            return len(self._loaded().paths)

    def paths_of(self, content: int) -> list[str]:
        """Return the paths of all searchable files with this content id."""
        with self._lock:
            pictures = self._loaded()
        places = np.flatnonzero(pictures.contents[pictures.rows] == content)
        return [os.fsdecode(pictures.paths[place]) for place in places]

    def picture_vector(self, file: BinaryIO, key: str) -> Vector:
        """Return the vector (D,) of an image, which is taken from the index if its content is indexed.

        Args:
            file: image file, read from its current position.
            key: name of the image in errors.

        Raises:
            BadSample: the image cannot be read.
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
                logger.warning("the text is too long for the model, which ignores its end: %.60s ...", text)
            vector: Vector = embedder.embed_texts([text])[0].numpy()
            try:
                self._index.keep_text(text, vector)
            except OSError as error:  # such as an index without write permission
                logger.warning("the vector of the text is not stored: %s", error)
            return vector

    def _file(self, path: Path) -> Vector:
        try:
            opened = path.open("rb")
        except OSError as error:
            raise BadSample("unreadable file", str(path), error.strerror or str(error)) from error
        with opened as file:
            return self.picture_vector(file, str(path))

    def _loaded(self) -> Pictures:
        """Return the files and vectors to search, and set `_approximate`. Both are read again if the index changed."""
        if self._pictures is not None and self._changes == self._index.changes():
            return self._pictures
        self._changes = self._index.changes()
        left_out = excluded(self._bytes, self._exclude)
        self._approximate = None
        if self._index.count(self._bytes) > self._exact_limit:
            self._approximate = Approximate(self._index)
            logger.warning(
                "approximate search of %d images: it finds %.1f %% of the 10 nearest",
                len(self._approximate),
                100 * self._approximate.recall,
            )
            files = [(path, content) for path, content in self._index.paths(self._bytes) if not left_out(path)]
            rows = np.fromiter((content for _, content in files), np.int64, len(files))
            contents, rows = np.unique(rows, return_inverse=True)
            nothing = np.empty((len(contents), 0), np.float32)  # only the vectors of a query's candidates are read
            self._pictures = Pictures([path for path, _ in files], rows, contents, nothing)
        else:
            pictures = self._index.pictures(self._bytes)
            kept = [place for place, path in enumerate(pictures.paths) if not left_out(path)]
            self._pictures = pictures._replace(paths=[pictures.paths[k] for k in kept], rows=pictures.rows[kept])
        return self._pictures

    def _nearest(
        self, graph: Approximate, pictures: Pictures, query: Vector, count: int
    ) -> list[tuple[bytes, float, int]]:
        """Return the best files of this folder by the graph.

        The graph also holds contents of other folders, so it is asked for more candidates until enough of them belong
        to this folder.
        """
        asked = count
        while True:
            ids = np.intersect1d(graph.nearest(query, asked), pictures.contents)
            if len(ids) >= count or asked >= len(graph):
                break
            asked *= 4  # the graph cannot be restricted to a folder
        vectors = np.empty((len(ids), len(query)), np.float32)
        for row, content in enumerate(ids):
            vectors[row] = self._index.vector_of(int(content))
        rows = np.searchsorted(pictures.contents, ids)
        places = np.flatnonzero(np.isin(pictures.rows, rows))
        paths = [pictures.paths[place] for place in places]
        few = Pictures(paths, np.searchsorted(rows, pictures.rows[places]), ids, vectors)
        return top(few, query, count)


def _is_cut(tokenize: Any, text: str) -> bool:
    """Return True if the text is longer than the model's context.

    Then neither the last character of the text nor further text changes its tokens. The same holds for a text that has
    no tokens at all, for which the function returns False.
    """
    cut, whole, more, nothing = tokenize([text[:-1], text, text + text, ""])
    return bool((cut == whole).all() and (whole == more).all() and (whole != nothing).any())
