"""Where the members of a tar file lie."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

__all__ = ["BLOCK", "Member", "Members", "tar_members"]

BLOCK = 512  # bytes; a member is a header of one block and data that are filled up to whole blocks

_REGULAR, _FOLDER, _EXTENDED = (b"0", b"\0"), b"5", b"x"
# Records of an extended header, "LENGTH NAME=VALUE\n", that change neither name nor size of the member. webdataset and
# img2dataset write one with every member's mtime.
_HARMLESS = re.compile(rb"(?:\d+ (?:[acm]time|[ug]id|[ug]name|comment)=[^\n]*\n)*\0*")


class Member(NamedTuple):
    """A regular file in a tar file."""

    name: str
    header: int  # offset in bytes of its header; the data follow in the next block
    size: int  # of the data, in bytes


class Members(NamedTuple):
    members: list[Member]
    broken: str  # why there are no more, of a file that is cut off or damaged; "" of a whole one


class _Doubt(Exception):
    """Something that `tarfile` knows better."""


def tar_members(file: BinaryIO) -> Members:
    """Every regular file of an uncompressed tar file, in order, from the headers alone.

    Plain headers are read here, several times as fast as `tarfile` does; where one holds anything else, such as a name
    of over 100 bytes, `tarfile` reads them all. A file that is cut off or damaged is read as far
    as it goes: the data of its last member may reach beyond its end.

    Args:
        file: unbuffered, open for reading; is read from its start.

    Raises:
        tarfile.TarError: it does not even begin as a tar file.
        ValueError: a sparse file, whose data do not lie in one piece.
    """
    try:
        return Members(list(_plain_members(file)), "")
    except _Doubt:
        file.seek(0)
        return _any_members(file)


def read_exactly(file: BinaryIO, size: int) -> bytes:
    """`size` bytes, fewer only at the file's end: one read may return less than there is, on some file systems."""
    parts, left = [], size
    while left and (part := file.read(left)):
        parts.append(part)
        left -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _plain_members(file: BinaryIO) -> Iterator[Member]:
    end = file.seek(0, io.SEEK_END)
    place = 0
    while True:
        file.seek(place)
        header = read_exactly(file, BLOCK)
        if len(header) < BLOCK:
            raise _Doubt
        if header[0] == 0:
            if place and not any(header):
                return
            raise _Doubt
        kind, size = header[156:157], _octal(header[124:136])
        if sum(header) - sum(header[148:156]) + 8 * ord(" ") != _octal(header[148:156]):
            raise _Doubt
        if kind in _REGULAR:
            yield Member(_name(header), place, size)
        elif kind == _EXTENDED:
            if size > 16 * BLOCK or _HARMLESS.fullmatch(read_exactly(file, size)) is None:
                raise _Doubt
        elif kind != _FOLDER or size:
            raise _Doubt
        place += BLOCK + -(-size // BLOCK) * BLOCK
        if place > end:
            raise _Doubt


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0")
    if not digits.isdigit():
        raise _Doubt
    try:
        return int(digits, 8)
    except ValueError as error:
        raise _Doubt from error


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return name.decode(tarfile.ENCODING, "surrogateescape")


def _any_members(file: BinaryIO) -> Members:
    found: list[Member] = []
    with tarfile.open(fileobj=file, mode="r:") as tar:
        try:
            for member in tar:
                if member.isfile():
                    if member.issparse():
                        raise ValueError(f"{member.name} is stored as a sparse file")
                    found.append(Member(member.name, member.offset_data - BLOCK, member.size))
        except tarfile.TarError as error:
            return Members(found, str(error))
        file.seek(tar.offset)
        # the end is a block of zeros, or, as some writers leave it, the file's
        ends_well = not file.read(BLOCK).strip(b"\0")
    return Members(found, "" if ends_well else "no header where one must be")
