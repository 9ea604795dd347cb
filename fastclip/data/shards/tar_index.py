"""Locate the members of a tar file."""

from __future__ import annotations

import io
import posixpath
import re
import tarfile
from typing import BinaryIO, NamedTuple

from fastclip.data.files import compression
from fastclip.system.rounding import ceil_div

__all__ = ["BLOCK", "Lost", "Member", "Members", "read_exactly", "tar_members"]

BLOCK = 512  # bytes; a member is a header of one block, followed by data that are padded to whole blocks

# The types of members. Of GNU's types, D is a list of names and V the label of a volume.
_REGULAR, _CONTIGUOUS, _FOLDER, _NO_FILES = (b"0", b"\0"), b"7", b"5", (b"D", b"V")
_HARD, _SYMBOLIC, _DEVICES, _SPARSE = b"1", b"2", (b"3", b"4", b"6"), b"S"
_LONG_NAME, _LONG_LINK, _EXTENDED, _GLOBAL = b"L", b"K", (b"x", b"X"), b"g"
_LARGEST = 2**20  # the most bytes of a long name or of extended records; real archives need a few hundred
_RECORD = re.compile(rb"([1-9]\d{0,7}) ([^=]+)=")
_HOPS = 40  # consecutive links to follow
_CHUNK = 2**20


class Member(NamedTuple):
    """A regular file in a tar file."""

    name: str
    header: int  # offset of its header in bytes; the data follow in the next block
    size: int  # of the data in bytes; the data may reach beyond the end of a file that is cut off

    @property
    def end(self) -> int:
        """The offset of the byte after the data."""
        return self.header + BLOCK + self.size


class Lost(NamedTuple):
    """An entry of a tar file whose data cannot be read."""

    name: str
    why: str  # "device or pipe", for example


class Members(NamedTuple):
    """The members of a tar file, and the reason why there may be more."""

    members: list[Member]  # a link has the name of the link and the place of its target
    broken: str  # the damage at which reading stopped; "" for a file that was read to its end
    lost: tuple[Lost, ...] = ()


class _Broken(Exception):
    """Raised for a header that cannot be used, with the reason."""


def tar_members(file: BinaryIO) -> Members:
    """Return every regular file in an uncompressed tar file, in order. Only the headers are read.

    The sizes that headers declare are checked first, so that reading always moves forward and cannot loop.
    Links within the file are followed. Data after the end of the archive, such as another archive, are read too. A file
    that is cut off or damaged is read up to the damage.

    Args:
        file: opened for reading without a buffer. The file is read from its start.

    Raises:
        tarfile.TarError: the file does not begin as a tar file.
    """
    return _Reader(file).read()


def read_exactly(file: BinaryIO, size: int) -> bytes:
    """Return the next `size` bytes of the file, fewer only at its end.

    On some file systems, a single unbuffered read may return fewer bytes than are available.
    """
    parts, left = [], size
    while left and (part := file.read(left)):
        parts.append(part)
        left -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


class _Reader:
    def __init__(self, file: BinaryIO) -> None:
        self._file, self._end = file, file.seek(0, io.SEEK_END)
        self._members: list[Member | None] = []  # None: the place of a link, which is resolved at the end
        self._links: list[tuple[int, str, str]] = []  # the link's index in `_members`, its name and its target
        self._lost: list[Lost] = []
        self._next: dict[str, bytes] = {}  # path, linkpath or size that an extended header sets for the next member

    def read(self) -> Members:
        place, broken, ended = 0, "", False
        while place < self._end and not broken:
            self._file.seek(place)
            header = read_exactly(self._file, BLOCK)
            if header[:1] in (b"\0", b"") and not any(header):
                place, ended = self._beyond_zeros(place), True
                continue
            try:
                place += self._step(header, place)
            except _Broken as error:
                if not place:
                    how = compression(header)
                    raise tarfile.ReadError(
                        f"it is compressed by {how}: decompress it first" if how else str(error)
                    ) from error
                broken = f"no tar header after the end of the archive, at byte {place:,}" if ended else str(error)
            ended = ended and bool(broken)
        if not self._end:
            raise tarfile.ReadError("empty file")
        if not broken and (place > self._end or self._next):
            broken = "unexpected end of data"
        self._follow_links()
        return Members([member for member in self._members if member is not None], broken, tuple(self._lost))

    def _step(self, header: bytes, place: int) -> int:
        """Process the header at `place` and return the number of bytes to the next header, at least one block."""
        if len(header) < BLOCK:
            raise _Broken("unexpected end of data")
        if not _checks(header):
            raise _Broken("a header is missing or has a wrong checksum")
        kind, size = header[156:157], _number(header[124:136])
        if kind in _REGULAR and not self._next:  # the fast path of most members
            if size < 0:
                raise _Broken(f"the header of {_name(header)} declares an impossible size of {size}")
            if (name := _name(header)).endswith("/") and kind == b"\0":  # a folder, as very old programs write it
                return BLOCK
            self._members.append(Member(name, place, size))
            return BLOCK + _filled(size)
        if kind in (_LONG_NAME, _LONG_LINK, _GLOBAL, *_EXTENDED):
            if not 0 <= size <= _LARGEST:
                raise _Broken(f"an extended header declares an impossible size of {size}")
            data = read_exactly(self._file, size)
            if len(data) < size:
                raise _Broken("unexpected end of data")
            self._note(kind, data)
            return BLOCK + _filled(size)
        return self._other(kind, size, header, place)

    def _note(self, kind: bytes, data: bytes) -> None:
        """Store the long name or the records of an extended header for the next member."""
        if kind in (_LONG_NAME, _LONG_LINK):
            self._next["path" if kind == _LONG_NAME else "linkpath"] = data.partition(b"\0")[0]
            return
        records = _records(data)
        if kind == _GLOBAL:
            if records:
                raise _Broken(
                    f"a global header sets {', '.join(records)} for all members, which is not supported: "
                    "write the archive again without it"
                )
        else:
            self._next |= records

    def _other(self, kind: bytes, size: int, header: bytes, place: int) -> int:
        """Process a member that has extended headers, or is not a regular file."""
        records, self._next = self._next, {}
        name = _text(records["path"]).rstrip("/") if "path" in records else _name(header)
        sparse = kind == _SPARSE or "sparse" in records
        if "size" in records:
            size = _decimal(records["size"], name)
        if kind == _FOLDER:
            return BLOCK
        if kind in (_HARD, _SYMBOLIC):  # no data follow, whatever size the header declares
            target = _text(records.get("linkpath", header[157:257].partition(b"\0")[0]))
            self._links.append((len(self._members), name, target if kind == _HARD else _beside(name, target)))
            self._members.append(None)
            return BLOCK
        if kind in _DEVICES:
            self._lost.append(Lost(name, "device or pipe"))
            return BLOCK
        if size < 0:
            raise _Broken(f"the header of {name} declares an impossible size of {size}")
        if sparse:
            self._lost.append(Lost(name, "sparse file"))
        elif kind in (*_REGULAR, _CONTIGUOUS):
            self._members.append(Member(name, place, size))
        elif kind not in _NO_FILES:
            self._lost.append(Lost(name, "unknown kind of member"))
        more = self._sparse_blocks(header, place) if kind == _SPARSE else 0
        return (1 + more) * BLOCK + _filled(size)

    def _sparse_blocks(self, header: bytes, place: int) -> int:
        """Return the number of map blocks between a sparse file's header and its data."""
        count, goes_on = 0, header[482]
        while goes_on and place + (count + 1) * BLOCK < self._end:
            count += 1
            self._file.seek(place + count * BLOCK + 504)
            goes_on = (self._file.read(1) or b"\0")[0]
        return count

    def _beyond_zeros(self, place: int) -> int:
        """Return the offset of the next block from `place` on that has a byte other than 0, or the end of the file."""
        self._file.seek(place)
        while chunk := read_exactly(self._file, _CHUNK):
            if rest := chunk.lstrip(b"\0"):
                return place + (len(chunk) - len(rest)) // BLOCK * BLOCK
            place += len(chunk)
        return self._end

    def _follow_links(self) -> None:
        known: dict[str, Member | str] = {
            posixpath.normpath(name): posixpath.normpath(target) for _, name, target in self._links
        }
        known |= {posixpath.normpath(member.name): member for member in self._members if member is not None}
        for turn, name, target in self._links:
            end: Member | str | None = posixpath.normpath(target)
            for _ in range(_HOPS):  # bounded, because links may form a cycle
                if not isinstance(end, str):
                    break
                end = known.get(end)
            if isinstance(end, Member):
                self._members[turn] = end._replace(name=name)
            else:
                self._lost.append(Lost(name, "link to nothing in the file"))


def _filled(size: int) -> int:
    """Return the number of bytes that data of this size take in the file, padded to whole blocks."""
    return ceil_div(size, BLOCK) * BLOCK


def _checks(header: bytes) -> bool:
    """Return True if the header's checksum is right. Old programs summed signed bytes, which is accepted too."""
    try:
        checksum = _octal(header[148:156])
    except _Broken:
        return False
    rest = header[:148] + b" " * 8 + header[156:]  # the format sums the header with a blank checksum field
    return sum(rest) == checksum or sum(rest) - 256 * sum(1 for byte in rest if byte > 127) == checksum


def _records(data: bytes) -> dict[str, bytes]:
    """Return the records "LENGTH NAME=VALUE\\n" of an extended header that change a member's place or name."""
    records, place = {}, 0
    while place < len(data) and data[place]:
        match = _RECORD.match(data, place)
        stop = place + int(match[1]) if match else 0
        if match is None or not match.end() < stop <= len(data) or data[stop - 1] != ord("\n"):
            raise _Broken("an extended header holds no valid records")
        name, value = match[2].decode("utf-8", "replace"), data[match.end() : stop - 1]
        if name in ("path", "linkpath", "size"):
            records[name] = value
        elif name.startswith("GNU.sparse."):
            records["sparse"] = value
        place = stop
    return records


def _number(field: bytes) -> int:
    """Return the number in a header's field.

    The field holds octal digits. In GNU's format, it may instead hold a big-endian number after a byte of value 128, or
    255 for a negative number.
    """
    if field[0] in (0o200, 0o377):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0o377 else 0)
    return _octal(field)


def _octal(field: bytes) -> int:
    digits = field.partition(b"\0")[0].strip()
    try:
        if digits.isdigit():
            return int(digits, 8)
    except ValueError:
        pass
    if not digits:
        return 0
    raise _Broken(f"a header holds an invalid number, {field!r}")


def _decimal(value: bytes, name: str) -> int:
    if not value.isdigit() or len(value) > 20:
        raise _Broken(f"the extended header of {name} declares an invalid size of {value[:40]!r}")
    return int(value)


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return _text(name)


def _text(name: bytes) -> str:
    return name.decode(tarfile.ENCODING, "surrogateescape")


def _beside(name: str, target: str) -> str:
    """Return the target of a symbolic link as a name in the file.

    An absolute target leads nowhere, because no name in the file begins with "/".
    """
    return posixpath.join(posixpath.dirname(name), target)
