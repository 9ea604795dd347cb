"""A shuffle of any size, computed number by number: nothing of that size is stored."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt

from fastclip.system.rounding import ceil_div

__all__ = ["Permutation", "mix"]

_ROUNDS = 8  # at 4, a chi-square test over all permutations of five numbers tells it from a shuffle; at 6 no more
_Words = npt.NDArray[np.uint64]


def mix(*parts: int) -> int:
    """64 bits that any change of a part changes; the same on every machine."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Permutation:
    """The numbers from 0 to `size` - 1 in an order that `key` decides.

    A Feistel network over pairs (left, right) of numbers modulo a and b, where a b is at least `size` and little more:
    a round adds a function of the right to the left, then one of the left to the right. A pair beyond `size` goes
    through the network again until it is not (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). Not a
    cipher: the functions are made for speed.

    Args:
        size: positive, under 2**62.
        key: any integer.
    """

    def __init__(self, size: int, key: int) -> None:
        if not 0 < size < 2**62:
            raise ValueError(f"size must be positive and under 2**62, got {size}")
        self.size = size
        self._right = math.isqrt(size - 1) + 1  # 2 of 3: with a single column there are rotations only
        self._left = ceil_div(size, self._right)
        self._keys = [(np.uint64(mix(key, k, 0)), np.uint64(mix(key, k, 1))) for k in range(_ROUNDS)]

    def __call__(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """(n,) places from 0 to `size` - 1 -> the numbers there, (n,) int64; the same however places are grouped."""
        numbers = self._network(places.astype(np.uint64))
        while (beyond := np.flatnonzero(numbers >= np.uint64(self.size))).size:
            numbers[beyond] = self._network(numbers[beyond])
        return numbers.astype(np.int64)

    def _network(self, places: _Words) -> _Words:
        left, right = np.divmod(places, np.uint64(self._right))
        for left_key, right_key in self._keys:
            left = _add(left, _scatter(right, left_key, self._left), self._left)
            right = _add(right, _scatter(left, right_key, self._right), self._right)
        return left * np.uint64(self._right) + right


def _add(a: _Words, b: _Words, modulus: int) -> _Words:
    total = a + b
    return np.minimum(total, total - np.uint64(modulus))  # below 0 is above all else


def _scatter(numbers: _Words, key: np.uint64, below: int) -> _Words:
    """A number from 0 to `below` - 1 for each, by a multiplicative hash; both are under 2**32."""
    x = numbers * np.uint64(0x9E3779B97F4A7C15) + key  # arrays wrap around
    x ^= x >> np.uint64(32)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x >>= np.uint64(32)
    x *= np.uint64(below)
    x >>= np.uint64(32)
    return x
