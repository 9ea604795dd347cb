"""Bring an index up to date with a folder: what is new or changed is read on all cores and embedded in batches."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import PIL
import PIL.Image

from fastclip.data.faults import BadSample
from fastclip.data.files import walk
from fastclip.data.picture import limit_in_words, read_picture
from fastclip.data.sources.folder import is_picture
from fastclip.search.index import Index, Seen
from fastclip.system.installed import installed_version

if TYPE_CHECKING:
    from torch import Tensor

    from fastclip.models.embedder import Embedder

    Transform = Callable[[Any], Tensor]

__all__ = ["EXCLUDED", "Update", "digest_of", "excluded", "prepared", "update_index"]

logger = logging.getLogger(__name__)
EXCLUDED = ("@eaDir", "node_modules", ".git")  # as rclip leaves out
_CHUNK = 2**20  # bytes hashed at a time
_SETTLED = 2 * 10**9  # ns after which a change of a file shows in its times, whatever the disk
_ROWS = 4096  # of a transaction, where little is to be embedded


@dataclass
class Update:
    """The counts of a scan; files that were as they had been are in `files` only."""

    files: int = 0
    embedded: int = 0
    known: int = 0  # new or renamed files, or changed ones, of a content that had been embedded
    removed: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)  # path and reason, met now
    seconds: float = 0.0


class _Read(NamedTuple):
    seen: Seen
    image: Tensor | None  # of a content that is new and can be used
    unread: str | None = None  # why nothing is known of the content: it is read again next time


def update_index(
    index: Index,
    folder: bytes,
    embedder: Callable[[], Embedder],
    *,
    exclude: Collection[str] = EXCLUDED,
    batch_size: int = 64,
    workers: int = 1,
    progress: bool = False,
) -> Update:
    """Make the index hold the pictures under `folder` as they are, but for hidden ones and folders that are left out.

    The scan can be stopped at any moment, a kill included: what was embedded is kept.

    Args:
        folder: absolute.
        embedder: called when the first picture is to be embedded.
        exclude: names of folders.
        workers: threads that read and decode; Pillow's decoders and torch run beside each other.

    Raises:
        FileNotFoundError, PermissionError: `folder` cannot be listed.
        ValueError: batch_size or workers is not positive.
    """
    if batch_size < 1 or workers < 1:
        raise ValueError(f"batch_size and workers must be positive, got {batch_size} and {workers}")
    start = time.monotonic()
    index.forget_faults(_reader())  # a newer Pillow, or a larger limit, may read what the one before could not
    before = index.stamps(folder)
    update = Update()
    changed, gone = [], set(before)
    for path, stamp in _walk(folder, exclude):
        update.files += 1
        gone.discard(path)
        if before.get(path) != stamp or stamp is None:
            changed.append(path)
    left_out = excluded(folder, exclude)
    gone = {path for path in gone if not left_out(path)}
    if gone:
        index.remove(gone)
    update.removed = len(gone)
    if changed:
        _add(index, changed, embedder, update, batch_size=batch_size, workers=workers, progress=progress)
    update.seconds = time.monotonic() - start
    return update


def excluded(folder: bytes, exclude: Collection[str]) -> Callable[[bytes], bool]:
    """Return a test whether a file is left out of `folder`.

    Such a file is hidden, or a folder between `folder` and the file is hidden or has one of these names.
    """
    slash = rb"[/\\]" if os.sep == "\\" else b"/"
    names = b"".join(b"|" + re.escape(os.fsencode(name)) + slash for name in exclude)
    hidden, start = re.compile(slash + rb"(?:\." + names + b")"), len(folder.rstrip(b"/"))
    return lambda path: hidden.search(path, start) is not None


def digest_of(file: BinaryIO) -> bytes:
    """Return 20 bytes that differ where contents do."""
    digest = hashlib.blake2b(digest_size=20)
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.digest()


def _reader() -> str:
    """Name what decides which pictures can be read."""
    reader = f"Pillow {PIL.__version__}"
    if limit := limit_in_words():
        reader += f", {limit}"
    if heif := installed_version("pillow-heif"):
        reader += f", pillow-heif {heif}"
    return reader


def _walk(folder: bytes, exclude: Collection[str]) -> Iterator[tuple[bytes, str | None]]:
    """Pictures and their stamps, as `fastclip.data.files.walk` goes."""
    for _, files in walk(folder, exclude):
        for entry in files:
            try:
                if is_picture(os.fsdecode(entry.name)) and entry.is_file():
                    yield entry.path, _stamp(os.stat(entry.path))
            except OSError as error:
                logger.warning("skipped: %s: %s", os.fsdecode(entry.path), error.strerror)


def _stamp(state: os.stat_result) -> str | None:
    """Differs from what it was where the file has been written to, or another has been put in its place; None of a file
    so new that a further change may not show."""
    now = time.time_ns()
    if min(abs(now - state.st_mtime_ns), abs(now - state.st_ctime_ns)) < _SETTLED:
        return None
    return " ".join(map(str, _times(state)))


def _times(state: os.stat_result) -> tuple[int, int, int]:
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns


def _add(
    index: Index,
    paths: list[bytes],
    embedder: Callable[[], Embedder],
    update: Update,
    *,
    batch_size: int,
    workers: int,
    progress: bool,
) -> None:
    from fastclip.system.progress import Progress

    known = index.digests()
    loading = threading.Lock()

    def read(path: bytes) -> _Read:
        return _read(path, known, transform)

    def transform() -> Transform:
        with loading:  # the first of the threads that needs the model loads it
            return embedder().transform

    with Progress("pictures", len(paths), shown=progress) as bar:
        for rows in _batches(_ahead(read, paths, workers, 2 * batch_size + workers), batch_size):
            read_rows = [row for row in rows if row.unread is None]
            files = _embedded(embedder, read_rows)
            update.embedded += sum(file.vector is not None for file in files)
            update.known += sum(row.image is None and file.fault is None for row, file in zip(read_rows, files))
            index.add(files)
            # copies that threads are yet to read are not embedded again
            known.update((file.digest, file.fault) for file in files)
            unread = [(row.seen.path, row.unread) for row in rows if row.unread is not None]
            if unread:
                index.remove(path for path, _ in unread)  # what was known of them no longer holds
            for path, reason in (*unread, *((file.path, file.fault) for file in files if file.fault is not None)):
                update.skipped.append((os.fsdecode(path), reason))
                logger.warning("skipped: %s: %s", *update.skipped[-1])
            bar.moved(len(rows))


def _batches(reads: Iterable[_Read], batch_size: int) -> Iterator[list[_Read]]:
    """Files in a row, with `batch_size` pictures to embed among them, or `_ROWS` where there are fewer."""
    rows: list[_Read] = []
    for row in reads:
        rows.append(row)
        if sum(row.image is not None for row in rows) >= batch_size or len(rows) >= _ROWS:
            yield rows
            rows = []
    if rows:
        yield rows


def _read(path: bytes, known: Mapping[bytes, str | None], transform: Callable[[], Transform]) -> _Read:
    """Read a file, in a thread."""
    nothing = Seen(path, None, b"")
    try:
        with open(path, "rb") as file:
            state = os.fstat(file.fileno())
            seen = Seen(path, _stamp(state), digest_of(file))
    except OSError as error:
        return _Read(nothing, None, error.strerror or str(error))
    if seen.digest in known:
        return _Read(seen._replace(fault=known[seen.digest]), None)
    prepare = transform()  # what fails here is no fault of the file
    try:
        with open(path, "rb") as file:
            image, fault = prepared(file, os.fsdecode(path), prepare)
            after = os.fstat(file.fileno())
    except OSError as error:
        return _Read(nothing, None, error.strerror or str(error))
    except MemoryError:
        return _Read(nothing, None, "there is not enough memory for it")
    if _times(state) != _times(after):  # the digest and the pixels may be of two pictures
        return _Read(nothing, None, "it changed while it was read")
    return _Read(seen._replace(fault=fault), image)


def prepared(file: BinaryIO, key: str, transform: Transform) -> tuple[Tensor | None, str | None]:
    """Return the picture for a model, or why it cannot be used. OSError where the disk does not give it."""
    try:
        picture = read_picture(file, key)
    except BadSample as bad:
        if bad.fault.cause == "unreadable file" and isinstance(bad.__cause__, OSError):  # the disk's fault
            raise bad.__cause__ from bad
        return None, bad.fault.reason
    try:
        return transform(picture), None
    except MemoryError:
        raise
    except Exception as error:  # of a strip 1 pixel high, say
        return None, f"the transform failed: {type(error).__name__}: {error}"


def _embedded(embedder: Callable[[], Embedder], rows: list[_Read]) -> list[Seen]:
    """The rows, those with pictures having their vectors."""
    images = [row.image for row in rows if row.image is not None]
    if not images:
        return [row.seen for row in rows]
    import torch

    vectors = iter(embedder().embed_images(torch.stack(images)).numpy())
    seen = []
    for row in rows:
        if row.image is None:
            seen.append(row.seen)
        elif np.isfinite(vector := next(vectors)).all():
            seen.append(row.seen._replace(vector=vector))
        else:  # it would be the best of every search
            seen.append(row.seen._replace(fault="the model makes no finite numbers of it"))
    return seen


def _ahead(work: Callable[[bytes], _Read], paths: Iterable[bytes], workers: int, ahead: int) -> Iterator[_Read]:
    """work(path) of every path, in order; `ahead` of them are begun before they are asked for."""
    rest = iter(paths)
    with ThreadPoolExecutor(workers, thread_name_prefix="read") as pool:
        waiting: deque[Future[_Read]] = deque()
        try:
            while True:
                while len(waiting) < ahead and (path := next(rest, None)) is not None:
                    waiting.append(pool.submit(work, path))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
