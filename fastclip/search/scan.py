"""Update of an index: new and changed images of a folder are read by several threads and embedded in batches."""

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
EXCLUDED = ("@eaDir", "node_modules", ".git")  # as in rclip
_CHUNK = 2**20  # bytes hashed at a time
_SETTLED = 2 * 10**9  # ns after which any change of a file shows in its times, on every file system
_ROWS = 4096  # files per transaction if few of them must be embedded


@dataclass
class Update:
    """Counts of an update. Unchanged files count only in `files`."""

    files: int = 0  # images in the folder
    embedded: int = 0
    known: int = 0  # new, renamed or changed files whose content was embedded before
    removed: int = 0  # files that are gone
    skipped: list[tuple[str, str]] = field(default_factory=list)  # path and reason, of this update
    seconds: float = 0.0


class _Read(NamedTuple):
    seen: Seen
    image: Tensor | None  # prepared image if the content is new and usable
    unread: str | None = None  # why the file could not be read; the next update tries again


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
    """Bring the index up to date with the images under `folder`, except hidden files and excluded folders.

    The update can be stopped or killed at any time: images that were embedded stay in the index.

    Args:
        index: index to update.
        folder: absolute path.
        embedder: function that returns the model. It is called when the first image must be embedded.
        exclude: names of folders to leave out.
        batch_size: images embedded at a time.
        workers: threads that read and decode images. Pillow's decoders release the GIL and run in parallel with torch.
        progress: show a progress bar.

    Raises:
        FileNotFoundError, PermissionError: `folder` cannot be listed.
        ValueError: batch_size or workers is not positive.
    """
    if batch_size < 1 or workers < 1:
        raise ValueError(f"batch_size and workers must be positive, got {batch_size} and {workers}")
    start = time.monotonic()
    index.forget_faults(_reader())  # a newer Pillow or a larger limit may read images that failed before
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
    """Return a function of a file's path that returns True if the file is excluded from `folder`.

    A file is excluded if it or a folder between `folder` and the file is hidden, or such a folder has a name in
    `exclude`.
    """
    slash = rb"[/\\]" if os.sep == "\\" else b"/"
    names = b"".join(b"|" + re.escape(os.fsencode(name)) + slash for name in exclude)
    hidden, start = re.compile(slash + rb"(?:\." + names + b")"), len(folder.rstrip(b"/"))
    return lambda path: hidden.search(path, start) is not None


def digest_of(file: BinaryIO) -> bytes:
    """Return a hash of the rest of a file, 20 bytes."""
    digest = hashlib.blake2b(digest_size=20)
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.digest()


def _reader() -> str:
    """Return a description of everything that determines which images can be read: Pillow, its limit, pillow-heif."""
    reader = f"Pillow {PIL.__version__}"
    if limit := limit_in_words():
        reader += f", {limit}"
    if heif := installed_version("pillow-heif"):
        reader += f", pillow-heif {heif}"
    return reader


def _walk(folder: bytes, exclude: Collection[str]) -> Iterator[tuple[bytes, str | None]]:
    """Yield the path and stamp of each image, in the order of `fastclip.data.files.walk`."""
    for _, files in walk(folder, exclude):
        for entry in files:
            try:
                if is_picture(os.fsdecode(entry.name)) and entry.is_file():
                    yield entry.path, _stamp(os.stat(entry.path))
            except OSError as error:
                logger.warning("skipped: %s: %s", os.fsdecode(entry.path), error.strerror)


def _stamp(state: os.stat_result) -> str | None:
    """Return a string that changes when a file is written to or replaced.

    It is None for a file so new that a further change might not show in its times.
    """
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
        with loading:  # the first thread that needs the model loads it
            return embedder().transform

    with Progress("images", len(paths), shown=progress) as bar:
        for rows in _batches(_ahead(read, paths, workers, 2 * batch_size + workers), batch_size):
            read_rows = [row for row in rows if row.unread is None]
            files = _embedded(embedder, read_rows)
            update.embedded += sum(file.vector is not None for file in files)
            update.known += sum(row.image is None and file.fault is None for row, file in zip(read_rows, files))
            index.add(files)
            # copies of these files that threads read later are not embedded again
            known.update((file.digest, file.fault) for file in files)
            unread = [(row.seen.path, row.unread) for row in rows if row.unread is not None]
            if unread:
                index.remove(path for path, _ in unread)  # earlier entries of these files may be outdated
            for path, reason in (*unread, *((file.path, file.fault) for file in files if file.fault is not None)):
                update.skipped.append((os.fsdecode(path), reason))
                logger.warning("skipped: %s: %s", *update.skipped[-1])
            bar.moved(len(rows))


def _batches(reads: Iterable[_Read], batch_size: int) -> Iterator[list[_Read]]:
    """Yield lists of consecutive files, each with `batch_size` images to embed, or with at most `_ROWS` files."""
    rows: list[_Read] = []
    for row in reads:
        rows.append(row)
        if sum(row.image is not None for row in rows) >= batch_size or len(rows) >= _ROWS:
            yield rows
            rows = []
    if rows:
        yield rows


def _read(path: bytes, known: Mapping[bytes, str | None], transform: Callable[[], Transform]) -> _Read:
    """Read a file and, if its content is new, prepare its image. This runs in a thread."""
    nothing = Seen(path, None, b"")
    try:
        with open(path, "rb") as file:
            state = os.fstat(file.fileno())
            seen = Seen(path, _stamp(state), digest_of(file))
    except OSError as error:
        return _Read(nothing, None, error.strerror or str(error))
    if seen.digest in known:
        return _Read(seen._replace(fault=known[seen.digest]), None)
    prepare = transform()  # outside of `try`: an error of the model is not a fault of the file
    try:
        with open(path, "rb") as file:
            image, fault = prepared(file, os.fsdecode(path), prepare)
            after = os.fstat(file.fileno())
    except OSError as error:
        return _Read(nothing, None, error.strerror or str(error))
    except MemoryError:
        return _Read(nothing, None, "there is not enough memory to decode it")
    if _times(state) != _times(after):  # digest and pixels may belong to different contents
        return _Read(nothing, None, "it changed while it was read")
    return _Read(seen._replace(fault=fault), image)


def prepared(file: BinaryIO, key: str, transform: Transform) -> tuple[Tensor | None, str | None]:
    """Return the transformed image (C, H, W) and None, or None and the reason why it cannot be used.

    Raises:
        OSError: the file cannot be read from the disk.
    """
    try:
        picture = read_picture(file, key)
    except BadSample as bad:
        if bad.fault.cause == "unreadable file" and isinstance(bad.__cause__, OSError):  # not the image's fault
            raise bad.__cause__ from bad
        return None, bad.fault.reason
    try:
        return transform(picture), None
    except MemoryError:
        raise
    except Exception as error:  # for example for a strip 1 pixel high
        return None, f"the transform failed: {type(error).__name__}: {error}"


def _embedded(embedder: Callable[[], Embedder], rows: list[_Read]) -> list[Seen]:
    """Return the files of `rows`, with vectors for those that have images."""
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
        else:  # a vector that is not finite would come first in every search
            seen.append(row.seen._replace(fault="the model returns values for it that are not finite"))
    return seen


def _ahead(work: Callable[[bytes], _Read], paths: Iterable[bytes], workers: int, ahead: int) -> Iterator[_Read]:
    """Yield work(path) for every path, in order. Up to `ahead` calls are started in threads before they are needed."""
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
