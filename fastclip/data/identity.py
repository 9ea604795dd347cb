"""Identity of samples: where each image is stored, and whether a source still holds the same samples."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator

from fastclip.data.faults import BadSample
from fastclip.data.files import file_state
from fastclip.data.source import Record, Source, picture_place, read_sample
from fastclip.data.sources.mixture import Mixture
from fastclip.data.sources.subset import Subset, spread
from fastclip.data.sources.table import Table

__all__ = ["fingerprint", "one_a_picture", "picture_places", "picture_states"]

_KEYS, _CAPTIONS = 4096, 256  # samples to inspect, evenly spread; fewer captions, as each may be a file to open


def picture_places(source: Source) -> Iterator[tuple[str, str]]:
    """Yield for each sample the real path of the file that holds its image, or "", and the image's name in that file.

    An image has exactly one place: relative paths, other spellings of a path and links are resolved.
    """
    return ((file, inside) for file, inside, _ in _files(source))


def picture_states(source: Source) -> Iterator[str]:
    """Yield for each sample a text that changes when its image changes: its place, and the size and time of its file.

    The texts are among the keys of a `fastclip.embedding.features.FeatureStore`. The cost is one `stat` per file. No
    file is opened.
    """
    for file, inside, state in _files(source):
        yield "\n".join((file, inside, "none" if state is None else file_state(state)))


def _files(source: Source) -> Iterator[tuple[str, str, os.stat_result | None]]:
    folders = dict[str, str]()
    last: tuple[str, str, os.stat_result | None] = ("", "", None)  # consecutive samples often share a shard
    for index in range(len(source)):
        try:
            named, inside = picture_place(source, index)
        except BadSample:  # the image's file does not exist
            named, inside = "", source.key(index)
        if named != last[0]:
            last = (named, *_real(named, folders))
        yield last[1], inside, last[2]


def _real(name: str, folders: dict[str, str]) -> tuple[str, os.stat_result | None]:
    """Return the file's real path and state. The links in a folder's path are resolved once for all its files."""
    folder, base = os.path.split(name)
    try:
        state = os.lstat(name) if name else None
    except (OSError, ValueError):
        return os.path.abspath(name) if "\0" not in name else name, None
    if state is None or base in ("", ".", ".."):
        return name, state
    if stat.S_ISLNK(state.st_mode):
        real = os.path.realpath(name)
        return real, os.stat(real) if os.path.exists(real) else None
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    return os.path.join(folders[folder], base), state


def fingerprint(source: Source) -> str:
    """Return 16 hex digits that identify the number, the order, the keys and the captions of the samples.

    At most 4,096 keys and 256 captions of each source of a mixture, evenly spread, are taken into account, and no image
    is read. The folder that all keys of a source share is left out, so that a dataset keeps its fingerprint if it is
    moved, or if its path is spelled differently.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part, draws in source.parts if isinstance(source, Mixture) else [(source, len(source))]:
        digest.update(f"{len(part)} {draws}\n".encode())
        for text in (*_keys(part), *_captions(part)):
            digest.update(_bytes(text) + b"\0")
    return digest.hexdigest()


def _bytes(text: str) -> bytes:
    try:
        # This gives a file name's bytes on disk. Another encoding would change stored fingerprints.
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # JSON may hold other lone surrogates
        return text.encode("utf-8", "surrogatepass")


def _keys(source: Source) -> list[str]:
    # The keys of hf: datasets and of damaged rows begin with the spec.
    keys = [source.key(k).removeprefix(f"{source.spec}, ") for k in spread(len(source), _KEYS)]
    begins = os.path.commonprefix(keys).rfind("/") + 1  # noqa: RUF071 - keys may be URLs or "0.tar: name", not paths
    return [key[begins:] for key in keys]


def _captions(source: Source) -> Iterator[str]:
    for index in spread(len(source), _CAPTIONS):
        try:
            yield "\n".join(source.captions(index))
        except BadSample as bad:
            yield bad.fault.cause


def one_a_picture(source: Source) -> Source:
    """Merge the rows of a table that show the same image into one sample with all different captions of these rows.

    Rows show the same image if `picture_places` gives them the same place. A source of any other kind is returned
    unchanged.
    """
    if not isinstance(source, Table):
        return source
    rows: dict[tuple[str, str], list[int]] = {}
    for index, place in enumerate(picture_places(source)):
        rows.setdefault(place, []).append(index)
    return source if len(rows) == len(source) else _Pictures(source, list(rows.values()))


class _Pictures(Subset):
    def __init__(self, source: Source, rows: list[list[int]]) -> None:
        super().__init__(source, [same[0] for same in rows])
        self._rows = rows

    def read(self, index: int, *, min_side: int | None = None) -> Record:
        captions = self.captions(index)
        # A row without a caption cannot be read, although another row of the same image may have one.
        first = next(row for row in self._rows[index] if self._captions_of(row))
        return read_sample(self.source, first, min_side=min_side)._replace(captions=captions)

    def captions(self, index: int) -> tuple[str, ...]:
        texts = (text for row in self._rows[index] for text in self._captions_of(row))
        return tuple(dict.fromkeys(texts)) or self.source.captions(self.indices[index])  # raises BadSample

    def _captions_of(self, row: int) -> tuple[str, ...]:
        try:
            return self.source.captions(row)
        except BadSample:
            return ()
