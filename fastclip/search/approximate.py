"""Approximate nearest neighbours with usearch's HNSW graph (Malkov and Yashunin 2016, arXiv:1603.09320).

It serves indices that are too large for a scan of all vectors per query. The graph is stored beside the index.
Contents of an index are never changed or removed, so the graph only grows.
"""

from __future__ import annotations

import hashlib
import logging
from itertools import chain, islice
from typing import Any

import numpy as np

from fastclip.search.index import Index, Vector
from fastclip.system.durable import new_file, write_json
from fastclip.system.reading import read_json

__all__ = ["Approximate"]

logger = logging.getLogger(__name__)
_QUERIES, _NEIGHBOURS = 100, 10  # with which recall is measured
_SAMPLED = 100  # contents whose digests identify an index
_EXPANSION = 256  # candidates of a search: more candidates give a higher recall and a slower search


class Approximate:
    """HNSW graph of all contents of an index. It is brought up to date when it is opened.

    Attributes:
        recall: share of the exact 10 nearest contents that the graph finds, for 100 vectors of the index. It is
            measured again whenever the graph has grown.

    Raises:
        ImportError: usearch is not installed.
    """

    def __init__(self, index: Index) -> None:
        try:
            from usearch.index import Index as Graph
        except ModuleNotFoundError as error:
            raise ImportError(
                "searching this many images needs usearch, which is not installed: pip install usearch",
                name=error.name,
            ) from error
        self._index = index
        self._file, self._about = (index.file.with_suffix(suffix) for suffix in (".usearch", ".usearch.json"))
        self._graph, self.recall, last = self._read(Graph)
        if (grown := self._grow(Graph, last)) is not None:
            self.recall = self._measured()
            self._write(grown)

    def __len__(self) -> int:
        return 0 if self._graph is None else len(self._graph)

    def nearest(self, query: Vector, count: int) -> list[int]:
        """Return the ids of about the `count` contents with the highest <query, vector>, in arbitrary order."""
        if self._graph is None:
            return []
        return [int(key) for key in self._graph.search(query.astype(np.float32), min(count, len(self))).keys]

    def _read(self, graph: Any) -> tuple[Any, float, int]:
        """Return the stored graph, its recall and its last content, or (None, 1.0, 0) if it is missing or damaged."""
        try:
            about = read_json(self._about)
            whole = graph.restore(str(self._file)) if self._file.is_file() else None
            last = int(about["last"])
            # after an index was removed and built again, the same ids denote other contents
            if whole is not None and len(whole) == int(about["size"]) and about["index"] == self._contents(last):
                whole.expansion_search = _EXPANSION
                return whole, float(about["recall"]), last
            logger.warning("%s does not belong to this index and is rebuilt", self._file)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:
            logger.warning("%s cannot be read (%s) and is rebuilt", self._file, error)
        return None, 1.0, 0

    def _grow(self, graph: Any, last: int) -> int | None:
        """Add the contents after `last` to the graph. Return the last one added, or None if there were none."""
        added = None
        for keys, vectors in self._index.vectors_after(last):
            if self._graph is None:
                self._graph = graph(ndim=vectors.shape[1], metric="ip", dtype="f16", expansion_search=_EXPANSION)
            self._graph.add(keys, vectors)
            added = int(keys[-1])
            logger.info("%s: %d vectors", self._file.name, len(self._graph))
        return added

    def _measured(self) -> float:
        """Measure `recall` by comparison with an exact search of all vectors."""
        queries = self._sample()
        best = np.full((len(queries), _NEIGHBOURS), -np.inf, np.float32)
        ids = np.full(best.shape, -1, np.int64)
        for keys, vectors in self._index.vectors_after(0):
            scores = np.concatenate([best, queries @ vectors.T], axis=1)
            names = np.concatenate([ids, np.broadcast_to(keys, (len(queries), len(keys)))], axis=1)
            kept = np.argpartition(-scores, _NEIGHBOURS - 1, axis=1)[:, :_NEIGHBOURS]
            best, ids = np.take_along_axis(scores, kept, 1), np.take_along_axis(names, kept, 1)
        true = [set(row[row >= 0].tolist()) for row in ids]
        hits = [len(true[k] & set(self.nearest(query, len(true[k])))) for k, query in enumerate(queries)]
        return sum(hits) / sum(map(len, true))

    def _sample(self) -> Vector:
        """Return up to 100 vectors (Q, D) evenly spread over the index."""
        pause = max(1, len(self) // _QUERIES)
        rows = chain.from_iterable(vectors for _, vectors in self._index.vectors_after(0))
        return np.stack(list(islice(rows, 0, pause * _QUERIES, pause)))

    def _contents(self, last: int) -> str:
        """Return a digest of a hundred contents up to `last`, which identifies the index."""
        numbers = sorted({max(1, last * k // _SAMPLED) for k in range(1, _SAMPLED + 1)})
        return hashlib.blake2b(b" ".join(map(self._index.digest_of, numbers)), digest_size=16).hexdigest()

    def _write(self, last: int) -> None:
        with new_file(self._file) as half:
            self._graph.save(str(half))
            self._about.unlink(missing_ok=True)  # after a crash, no old description may be beside a new graph
        about = {"size": len(self._graph), "last": last, "recall": round(self.recall, 4), "index": self._contents(last)}
        write_json(self._about, about, indent=None)
