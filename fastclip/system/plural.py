"""Numbers with their nouns, in the singular or plural. Imports nothing."""

from __future__ import annotations

__all__ = ["counted"]


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun, such as ``1 image`` or ``2,048 images``; the default plural ends in s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
