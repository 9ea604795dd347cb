"""Whether two sources hold the same samples in the same order, as far as a look at some of them tells."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

from fastclip.data.faults import BadSample
from fastclip.data.mixture import Mixture
from fastclip.data.source import Source

__all__ = ["fingerprint"]

_KEYS, _CAPTIONS = 4096, 256  # samples that are looked at, evenly spread; captions may be files of their own


def fingerprint(source: Source) -> str:
    """16 hex digits of the number, the order, the keys and the captions of samples; no picture is read.

    Of keys what follows the folder that all of a part have: however it is spelled, and wherever it was moved to, a
    folder has the same samples.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part, draws in source.parts if isinstance(source, Mixture) else [(source, len(source))]:
        digest.update(f"{len(part)} {draws}\n".encode())
        for text in (*_keys(part), *_captions(part)):
            digest.update(_bytes(text) + b"\0")
    return digest.hexdigest()


def _bytes(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")  # a file's name as the disk has it
    except UnicodeEncodeError:  # JSON may hold any half of a surrogate pair
        return text.encode("utf-8", "surrogatepass")


def _keys(source: Source) -> list[str]:
    keys = [source.key(k).removeprefix(f"{source.spec}, ") for k in _spread(source, _KEYS)]  # hf:'s, damaged rows'
    begins = os.path.commonprefix(keys).rfind("/") + 1  # noqa: RUF071 - keys are no paths alone: URLs, "0.tar: name"
    return [key[begins:] for key in keys]


def _captions(source: Source) -> Iterator[str]:
    for index in _spread(source, _CAPTIONS):
        try:
            yield "\n".join(source.captions(index))
        except BadSample as bad:
            yield bad.fault.cause


def _spread(source: Source, most: int) -> Iterator[int]:
    size = len(source)
    count = min(most, size)
    return (k * size // count for k in range(count))
