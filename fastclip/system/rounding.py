"""Integer division that rounds up, without imports, so that any module can use it."""

from __future__ import annotations

__all__ = ["ceil_div"]


def ceil_div(a: int, b: int) -> int:
    """Return the smallest integer that is at least a / b, exact for integers of any size."""
    return -(-a // b)
