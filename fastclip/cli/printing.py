"""Printing to terminals, files and closed streams. Control characters in names are escaped where a terminal obeys them.

On stdout, names are printed unchanged for other programs unless stdout is a terminal. Stderr and the log are always
escaped, because they may be read on a terminal later.
"""

from __future__ import annotations

import codecs
import io
import logging
import os
import sys
from contextlib import suppress
from typing import Any

from fastclip.data.faults import escaped, shown

__all__ = ["LogLines", "complain", "leave_stdout", "lone_names", "prepare_streams", "say"]

_ESCAPES = "fastclip.escapes"


class LogLines(logging.Formatter):
    """Format each message as one line, whatever names it contains; a traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = _harmless(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return _harmless_lines(super().formatException(ei))


def say(*texts: Any) -> None:
    """Print a line on stdout; on a terminal its control characters are escaped."""
    line = " ".join(map(str, texts))
    if sys.stdout.isatty():
        line = _harmless_lines(line)
    _print(line)


def complain(text: str) -> None:
    """Print a line on stderr, with control characters escaped."""
    print(_harmless_lines(text), file=sys.stderr)


def lone_names(rows: list[tuple[str, str]], *, print0: bool = False) -> None:
    """Print rows that end in the name of a file, in exactly the bytes of the name, whatever the encoding of stdout.

    Args:
        rows: pairs of a prefix, which includes the separator, and the name.
        print0: end rows in a zero byte, for ``xargs -0``, and escape nothing.
    """
    if sys.stdout.isatty() and not print0:
        for before, name in rows:
            _print(before + shown(name))
        return
    end = "\0" if print0 else "\n"
    data = b"".join(os.fsencode(before + name + end) for before, name in rows)
    stream = getattr(sys.stdout, "buffer", None)
    if stream is None:  # a text stream of the caller
        _print(data.decode("utf-8", "replace"), end="")
    else:
        sys.stdout.flush()
        stream.write(data)
        stream.flush()


def _harmless(line: str) -> str:
    return "".join(x if x.isprintable() or x == "\t" else escaped(x) for x in line)


def _harmless_lines(text: str) -> str:
    return "\n".join(map(_harmless, text.split("\n")))


def _print(line: str, end: str = "\n") -> None:
    """Print a text, with a replacement for each character that stdout cannot encode, so that no result is lost."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(line.encode(encoding, "replace").decode(encoding), end=end)


def prepare_streams() -> None:
    """Make every print of this process succeed, whatever the text and the streams are.

    A closed stream (``>&-``) is replaced by /dev/null. Otherwise the next file to be opened would get its number, and
    would receive what a library writes to the stream. A character that the encoding lacks is escaped, as ``\\u2026``;
    the bytes of names that are not UTF-8 stay as they are.
    """
    # In the order 0, 1, 2, because a file that is opened gets the lowest free number
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    codecs.register_error(_ESCAPES, _escape_unencodable)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ESCAPES)


def leave_stdout() -> None:
    """Stop writing to stdout, which nobody reads, so that the interpreter can end without an error about its buffer."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _escape_unencodable(error: UnicodeError) -> tuple[str | bytes, int]:
    if isinstance(error, UnicodeEncodeError):
        with suppress(UnicodeEncodeError):
            return error.object[error.start : error.end].encode("ascii", "surrogateescape"), error.end
    return codecs.backslashreplace_errors(error)
