"""Standard streams that no command has to think of: closed ones, and those of terminals that lack characters."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys

__all__ = ["leave_stdout", "prepare_streams"]

_ESCAPES = "fastclip.escapes"


def prepare_streams() -> None:
    """Have every print of this process succeed as far as the words are concerned.

    A stream that was closed (``>&-``) is /dev/null: else the next file that is opened gets its number, and with it what
    a library writes. What an encoding lacks is escaped, as ``\\u2026``; bytes of names that are not UTF-8 stay as they
    are.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # 0, 1, 2: the lowest free number is taken
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    codecs.register_error(_ESCAPES, _escape)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ESCAPES)


def leave_stdout() -> None:
    """Write no more to stdout, which nobody reads: the interpreter's end would complain of what is buffered."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    if isinstance(error, UnicodeEncodeError):
        with contextlib.suppress(UnicodeEncodeError):
            return error.object[error.start : error.end].encode("ascii", "surrogateescape"), error.end
    return codecs.backslashreplace_errors(error)
