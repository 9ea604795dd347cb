"""The protocol of all kinds of data: images with captions, which are read by index."""

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

_PLAIN = ("a photo of a {}",)  # for data that have classes but come without templates


class Record(NamedTuple):
    """An image with the captions that belong to it."""

    image: Image.Image  # of any mode
    captions: tuple[str, ...]  # at least one
    key: str  # the name by which messages refer to the sample: a path, or a shard and the member's name
    label: int | None = None  # its class, an index into `Source.class_names`; None without classes


class Source(Protocol):
    """The samples of a dataset by index, in an object that is cheap to copy into worker processes."""

    spec: str  # the dataset's name on the command line, as the user wrote it
    class_names: tuple[str, ...]  # () if samples have no class
    templates: tuple[str, ...]  # the dataset's captions of a class, with ``{}`` in place of its name; () without any

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Read the sample, from disk at each call.

        Raises:
            BadSample: this sample cannot be used, but others can.
            OSError, ValueError: the file that holds the samples, such as a shard, cannot be used. The message names it.
        """
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of `self[index]` without reading its image. Raises the same errors."""
        ...

    def key(self, index: int) -> str:
        """Return the key of `self[index]` without reading a file."""
        ...


def class_captions(name: str, templates: tuple[str, ...]) -> tuple[str, ...]:
    """Return the captions of the class `name` from `Source.templates`, or "a photo of a NAME" without templates."""
    return tuple(template.format(name) for template in templates or _PLAIN)


def read_sample(source: Source, index: int, *, min_side: int | None = None) -> Record:
    """Return `source[index]`, with a smaller image if the source has a method ``read(index, min_side=)``.

    Args:
        min_side: the least length in pixels that the image's shorter side must keep, if it is that long. None reads
            the image in full size.
    """
    read = getattr(source, "read", None)
    return source[index] if read is None else read(index, min_side=min_side)


def picture_bytes(source: Source, index: int) -> bytes | None:
    """Return the bytes of the image's file, or None if the source has no method ``picture_bytes(index)``.

    Raises the same errors as `source[index]` if the file cannot be read.
    """
    read = getattr(source, "picture_bytes", None)
    return None if read is None else read(index)


def picture_place(source: Source, index: int) -> tuple[str, str]:
    """Return the path of the file that holds the image of `source[index]`, and the image's name in that file.

    The name is "" if the file is the image itself. If there is no file, or the source has no method
    ``picture_place(index)``, the two are "" and the key.

    Raises BadSample if the file cannot be found.
    """
    read = getattr(source, "picture_place", None)
    return ("", source.key(index)) if read is None else read(index)


def sample_fields(source: Source, index: int) -> dict[str, Any]:
    """Return further fields of `source[index]` to store in JSON; {} if the source has no method ``fields(index)``."""
    read = getattr(source, "fields", None)
    return {} if read is None else read(index)


def sample_stamp(source: Source, index: int) -> str:
    """Return a text that changes when `source[index]` changes.

    The text holds the path, the size and the time of the image's file, the captions, and the fields of
    `sample_fields`. For a sample that cannot be used it is the fault.
    """
    try:
        file, name = picture_place(source, index)
        captions, fields = source.captions(index), sample_fields(source, index)
    except BadSample as bad:
        return "\n".join(bad.fault)
    return "\n".join((file_stamp(file) if file else "", name, *captions, repr(fields)))


class Strings:
    """A list of strings in one buffer, which forked worker processes share.

    Workers would in time copy every memory page of an ordinary list: reading a string writes its reference count, and
    a page that is written after a fork is copied.
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
        """Return the string at `index`. Raises IndexError for negative indices too."""
        if not 0 <= index < len(self):
            raise IndexError(f"{index} of {len(self)}")
        return self._bytes[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogatepass")


class PictureFiles:
    """Base class of sources whose images are files: `names` in `folder`, with their paths as keys.

    A subclass appends to `_names` and overrides `captions`. It overrides `_file` too if an image may have another name
    on the disk.
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
        """Return sample `index`; see `read_sample`."""
        captions, key = self.captions(index), self.key(index)  # first: without captions the image need not be decoded
        return Record(read_picture(self._file(index), key, min_side=min_side), captions, key, self._label(index))

    def captions(self, index: int) -> tuple[str, ...]:
        return ()

    def key(self, index: int) -> str:
        return str(self._folder / self._names[index])

    def picture_bytes(self, index: int) -> bytes:
        """Return the bytes of the image's file."""
        return read_file(self._file(index))

    def picture_place(self, index: int) -> tuple[str, str]:
        """Return the path of the image's file and ""; see the function `picture_place`."""
        return str(self._file(index)), ""

    def _file(self, index: int) -> Path:
        return self._folder / self._names[index]

    def _label(self, index: int) -> int | None:
        return None
