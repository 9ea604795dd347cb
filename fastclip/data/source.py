"""The protocol of every kind of data: pictures and captions that are read by number."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image

from fastclip.data.faults import BadSample
from fastclip.data.files import file_stamp, read_file
from fastclip.data.picture import read_picture

__all__ = [
    "PictureFiles",
    "Record",
    "Source",
    "Strings",
    "class_captions",
    "picture_bytes",
    "picture_place",
    "read_sample",
    "sample_fields",
    "sample_stamp",
]

_PLAIN = ("a photo of a {}",)  # where data with classes have no templates of their own


class Record(NamedTuple):
    """A picture with the captions that belong to it."""

    image: Image.Image  # of any mode
    captions: tuple[str, ...]  # at least one
    key: str  # what messages call it: a path, or a shard and its member
    label: int | None = None  # its class, a place in `Source.class_names`, where there are classes


class Source(Protocol):
    """Samples of a data set by number; cheap to copy into worker processes."""

    spec: str  # as the user wrote it
    class_names: tuple[str, ...]  # () where samples have no class
    templates: tuple[str, ...]  # the data's own captions of a class, ``{}`` in place of its name; () where it has none

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Read from disk at each call.

        Raises:
            BadSample: this sample cannot be used; others can.
            OSError, ValueError: what they are read from cannot be used, with its name.
        """
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of `self[index]` without reading its picture. Raises as `self[index]` does."""
        ...

    def key(self, index: int) -> str:
        """Return the key of `self[index]` without reading anything."""
        ...


def class_captions(name: str, templates: tuple[str, ...]) -> tuple[str, ...]:
    """Return the captions of the class `name` by `Source.templates`; "a photo of a NAME" without templates."""
    return tuple(template.format(name) for template in templates or _PLAIN)


def read_sample(source: Source, index: int, *, min_side: int | None = None) -> Record:
    """Return `source[index]`, its picture perhaps smaller if the source has a method ``read(index, min_side=)``.

    Args:
        min_side: pixels that the picture's shorter side must keep, as far as it has so many; None is the whole picture.
    """
    read = getattr(source, "read", None)
    return source[index] if read is None else read(index, min_side=min_side)


def picture_bytes(source: Source, index: int) -> bytes | None:
    """Return the bytes of the picture's file; None if the source has no method ``picture_bytes(index)``.

    Raises as `source[index]` does where the file cannot be read.
    """
    read = getattr(source, "picture_bytes", None)
    return None if read is None else read(index)


def picture_place(source: Source, index: int) -> tuple[str, str]:
    """Return the path of the file that holds the picture of `source[index]`, and the picture's name in the file.

    The name is "" if the file is the picture. Without a file, and without a method ``picture_place(index)`` of the
    source, the two are "" and the key.

    Raises BadSample where the file cannot be found.
    """
    read = getattr(source, "picture_place", None)
    return ("", source.key(index)) if read is None else read(index)


def sample_fields(source: Source, index: int) -> dict[str, Any]:
    """Return the other fields of `source[index]` for its JSON; {} if the source has no method ``fields(index)``."""
    read = getattr(source, "fields", None)
    return {} if read is None else read(index)


def sample_stamp(source: Source, index: int) -> str:
    """Return a text that changes once `source[index]` does.

    It holds the place, the size and the time of the picture's file, the captions, and what else is known of the sample.
    """
    try:
        file, name = picture_place(source, index)
        captions, fields = source.captions(index), sample_fields(source, index)
    except BadSample as bad:
        return "\n".join(bad.fault)
    return "\n".join((file_stamp(file) if file else "", name, *captions, repr(fields)))


class Strings:
    """Strings by number, in one buffer.

    Worker processes that are forked share it. Of a list they would in time copy every page, because each string's
    reference count is written when it is read.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._bytes, self._ends = bytearray(), array("q", [0])
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        self._bytes += text.encode("utf-8", "surrogatepass")  # file names and JSON may hold lone surrogates
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        """`index` counts from 0 only."""
        if not 0 <= index < len(self):
            raise IndexError(f"{index} of {len(self)}")
        return self._bytes[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogatepass")


class PictureFiles:
    """Samples whose pictures are files, called by their paths: `names` in `folder`, to which a kind of data appends.

    A kind of data has its own `captions`, and its own `_file` where a picture may lie under another name.
    """

    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    def __init__(self, spec: str, folder: Path, names: Iterable[str] = ()) -> None:
        self.spec, self._folder, self._names = spec, folder, Strings(names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Record:
        return self.read(index)

    def read(self, index: int, *, min_side: int | None = None) -> Record:
        """As `read_sample`."""
        captions, key = self.captions(index), self.key(index)  # captions first: a sample without any costs no picture
        return Record(read_picture(self._file(index), key, min_side=min_side), captions, key, self._label(index))

    def captions(self, index: int) -> tuple[str, ...]:
        return ()

    def key(self, index: int) -> str:
        return str(self._folder / self._names[index])

    def picture_bytes(self, index: int) -> bytes:
        """As the function `picture_bytes`."""
        return read_file(self._file(index))

    def picture_place(self, index: int) -> tuple[str, str]:
        """As the function `picture_place`."""
        return str(self._file(index)), ""

    def _file(self, index: int) -> Path:
        return self._folder / self._names[index]

    def _label(self, index: int) -> int | None:
        return None
