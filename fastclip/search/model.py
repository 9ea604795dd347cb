"""The model of a search, which is loaded when something must be embedded, and not before."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastclip._version import __version__
from fastclip.system import env
from fastclip.system.durable import write_json
from fastclip.system.reading import read_json

if TYPE_CHECKING:
    from fastclip.models.embedder import Embedder

__all__ = ["CheckpointModel", "Model"]

logger = logging.getLogger(__name__)


class Model(Protocol):
    """The model that vectors come from."""

    @property
    def identity(self) -> str:
        """Vectors may be compared where it is the same; fit for a file's name."""
        ...

    @property
    def embedder(self) -> Embedder: ...


class CheckpointModel:
    """A checkpoint; its identity, for which all weights must be read, is remembered for as long as its files stay.

    Args:
        checkpoint: this and the options as `load_embedder`'s.
        folder: what is remembered lies there; default: FASTCLIP_CACHE.

    Raises:
        FileNotFoundError: there is no such checkpoint. The rest, when it is loaded, as `load_embedder`.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        model: str | None = None,
        device: str | None = None,
        precision: str | None = None,
        vocabulary: str | Path | None = None,
        image_size: int | None = None,
        context_length: int | None = None,
        folder: Path | None = None,
    ) -> None:
        self._checkpoint = Path(checkpoint)
        if not self._checkpoint.exists():
            raise FileNotFoundError(f"there is no checkpoint {checkpoint}")
        self._options: dict[str, Any] = {"model": model, "device": device, "precision": precision}
        self._options |= {"vocabulary": vocabulary, "image_size": image_size, "context_length": context_length}
        # A file that was written to, or another version that reads it otherwise, has another name, and is read again
        mark = [__version__, sorted((k, str(v)) for k, v in self._options.items()), _states(self._checkpoint)]
        if vocabulary is not None:
            mark.append(_states(Path(vocabulary)))
        name = hashlib.blake2b(json.dumps(mark).encode(), digest_size=16).hexdigest()
        self._remembered = (folder or env.cache_folder()) / "search" / "checkpoints" / f"{name}.json"

    @cached_property
    def embedder(self) -> Embedder:
        from fastclip.models.embedder import load_embedder

        logger.info("loading %s", self._checkpoint)
        loaded = load_embedder(self._checkpoint, **self._options)
        if (memory := self._memory) is not None and memory["precision"] != loaded.precision:
            self._remembered.unlink(missing_ok=True)  # the default depends on the machine's GPU
            raise ValueError(
                f"{self._checkpoint} computes in {loaded.precision} now and did in {memory['precision']} before: "
                f"run this again for an index in {loaded.precision}, or give the precision"
            )
        return loaded

    @cached_property
    def identity(self) -> str:
        if self._memory is not None:
            return self._memory["identity"]
        loaded = self.embedder
        self._remembered.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._remembered, {"identity": loaded.identity, "precision": loaded.precision}, indent=None)
        return loaded.identity

    @cached_property
    def _memory(self) -> dict[str, str] | None:
        try:
            memory = read_json(self._remembered)
            return {name: str(memory[name]) for name in ("identity", "precision")}
        except (OSError, ValueError, KeyError):
            return None


def _states(path: Path) -> list[Any]:
    """Return name, size and times of a file, or of all files of a folder."""
    files = sorted(_files(path)) if path.is_dir() else [path]
    states = [(str(file), file.stat()) for file in files if file.exists()]
    return [
        [os.path.realpath(path)],
        [(name, state.st_size, state.st_mtime_ns, state.st_ctime_ns) for name, state in states],
    ]


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder, and of those that links lead to, each once: links may lead round in circles."""
    met = set[str]()
    for place, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        if (real := os.path.realpath(place)) in met:
            folders.clear()
        else:
            met.add(real)
            yield from (Path(place, name) for name in names)
