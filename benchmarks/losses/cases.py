"""Sizes and dtypes of the measurements on each device."""

from __future__ import annotations

import re

SIZES = {
    "cpu": [(N, 512) for N in (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)],
    "cuda": [(8192, 512), (32768, 512), (65536, 768), (131072, 1024)],
}
DTYPES = {"cpu": ["float32", "bfloat16"], "cuda": ["bfloat16"]}


def parse_sizes(text: str | None, device: str) -> list[tuple[int, int]]:
    """Parse `1024,4096x768` as pairs (N, D), with D = 512 by default. Without a text, return the device's sizes."""
    if not text:
        return SIZES[device]
    sizes = []
    for word in text.split(","):
        match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", word)
        if not match:
            raise ValueError(f"size {word!r} is not N or NxD, as in 1024 or 4096x768")
        sizes.append((int(match[1]), int(match[2] or 512)))
    return sizes


def size_name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
