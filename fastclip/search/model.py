"""The model of a search, which is loaded only when something must be embedded."""

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
    """The model that computes the vectors of an index."""

    @property
    def identity(self) -> str:
        """String usable in a file name. Vectors of models with the same identity can be compared."""
        ...

    @property
    def embedder(self) -> Embedder:
        """The loaded model."""
        ...


class CheckpointModel:
    """A checkpoint that is loaded on first use.

    Computing the identity of a checkpoint requires reading all weights. It is therefore stored in a file, which stays
    valid until the files of the checkpoint change.

    Args:
        checkpoint: path of the checkpoint. This and the options are arguments of `load_embedder`.
        folder: folder for the stored identity (default: FASTCLIP_CACHE).

    Raises:
        FileNotFoundError: there is no such checkpoint. Other errors of `load_embedder` are raised on first use.
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
        # The name depends on the state of the files and on the version, so that a checkpoint that was changed, or that
        # another version may read differently, is read again
        mark = [__version__, sorted((k, str(v)) for k, v in self._options.items()), _states(self._checkpoint)]
        if vocabulary is not None:
            mark.append(_states(Path(vocabulary)))
        name = hashlib.blake2b(json.dumps(mark).encode(), digest_size=16).hexdigest()
        self._remembered = (folder or env.cache_folder()) / "search" / "checkpoints" / f"{name}.json"

    @cached_property
    def embedder(self) -> Embedder:
        """The loaded model.

        Raises:
            ValueError: the default precision has changed since the identity was stored, for example with the GPU.
        """
        from fastclip.models.embedder import load_embedder

        logger.info("loading %s", self._checkpoint)
        loaded = load_embedder(self._checkpoint, **self._options)
        if (memory := self._memory) is not None and memory["precision"] != loaded.precision:
            self._remembered.unlink(missing_ok=True)  # the default precision depends on the machine's GPU
            raise ValueError(
                f"{self._checkpoint} now computes in {loaded.precision}, but its index was built in "
                f"{memory['precision']}: run this again for an index in {loaded.precision}, or set --precision"
            )
        return loaded

    @cached_property
    def identity(self) -> str:
        """Stored or computed identity of the checkpoint."""
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
    """Return the real path, and name, size and times of the file or of all files in the folder."""
    files = sorted(_files(path)) if path.is_dir() else [path]
    states = [(str(file), file.stat()) for file in files if file.exists()]
    return [
        [os.path.realpath(path)],
        [(name, state.st_size, state.st_mtime_ns, state.st_ctime_ns) for name, state in states],
    ]


def _files(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder, following links. Each folder is visited once, because links may form cycles."""
    met = set[str]()
    for place, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        if (real := os.path.realpath(place)) in met:
            folders.clear()
        else:
            met.add(real)
            yield from (Path(place, name) for name in names)
