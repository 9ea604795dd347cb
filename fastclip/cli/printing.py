"""What is printed: names are quoted on a terminal, which would obey what is in them; streams may be closed.

On stdout names are as they are for other programs. Stderr and the log are quoted wherever they go: they may be read on
a terminal later.
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
    """Format each message as one line, whatever names are in it; a traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = _harmless(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return _harmless_lines(super().formatException(ei))


def say(*texts: Any) -> None:
    """Print a line; on a terminal what is in it cannot do anything but be read, and elsewhere it is as it is."""
    line = " ".join(map(str, texts))
    if sys.stdout.isatty():
        line = _harmless_lines(line)
    _print(line)


def complain(text: str) -> None:
    """Print a line on stderr, which a terminal can only show, wherever stderr goes."""
    print(_harmless_lines(text), file=sys.stderr)


def lone_names(rows: list[tuple[str, str]], *, print0: bool = False) -> None:
    """Print rows of something and the name of a file: the bytes that the file has, whatever stdout's encoding.

    Args:
        rows: what stands before the name, with what separates the two, and the name.
        print0: rows end in a zero byte, for ``xargs -0``, and nothing is quoted.
    """
    if sys.stdout.isatty() and not print0:
        for before, name in rows:
            _print(before + shown(name))
        return
    end = "\0" if print0 else "\n"
    data = b"".join(os.fsencode(before + name + end) for before, name in rows)
    stream = getattr(sys.stdout, "buffer", None)
    if stream is None:  # a caller's stream of text
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
    """Print a text; what stdout cannot encode is replaced: half of the results and an error help nobody."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(line.encode(encoding, "replace").decode(encoding), end=end)


def prepare_streams() -> None:
    """Have every print of this process succeed as far as the words are concerned.

    A stream that was closed (``>&-``) is /dev/null: else the next file that is opened gets its number, and with it what
    a library writes. What an encoding lacks is escaped, as ``\\u2026``; bytes of names that are not UTF-8 stay as they
    are.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # 0, 1, 2: the lowest free number is taken
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    codecs.register_error(_ESCAPES, _escape_unencodable)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ESCAPES)


def leave_stdout() -> None:
    """Write no more to stdout, which nobody reads: the interpreter's end would complain of what is buffered."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _escape_unencodable(error: UnicodeError) -> tuple[str | bytes, int]:
    if isinstance(error, UnicodeEncodeError):
        with suppress(UnicodeEncodeError):
            return error.object[error.start : error.end].encode("ascii", "surrogateescape"), error.end
    return codecs.backslashreplace_errors(error)
