"""Files with faulty data."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"


def picture(shade: int = 0, kind: str = "PNG", **options: Any) -> bytes:
    """Return an image 16 pixels wide and 8 high, with noise around a grey."""
    noise = np.random.default_rng(shade).integers(0, 8, (8, 16, 3))
    file = io.BytesIO()
    Image.fromarray((noise + shade).astype(np.uint8)).save(file, kind, **options)
    return file.getvalue()


def large_png(side: int) -> bytes:
    """Return a small but valid file of `side` x `side` black pixels with one bit each."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    row = bytes(1 + -(-side // 8))
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    data = zlib.compress(row * side, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_folder(folder: Path, good: int, bad: list[tuple[bytes, bytes | None]] | None = None) -> Path:
    """Write `good` images with captions, and for each of `bad` an image (named as PNG) with a caption, or without for
    None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(picture(k), f"caption {k}".encode()) for k in range(good)]
    for k, (image, text) in enumerate([*pairs, *(bad or [])]):
        (folder / f"{k:03d}.png").write_bytes(image)
        if text is not None:
            (folder / f"{k:03d}.txt").write_bytes(text)
    return folder
