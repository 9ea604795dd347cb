"""A pseudo-random permutation of any size. Each element is computed on demand, and none is stored."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt

from fastclip.system.rounding import ceil_div

__all__ = ["Permutation", "mix"]

# With 4 rounds, a chi-square test over all permutations of five numbers tells the result from a true shuffle. With 6
# rounds the test no longer does.
_ROUNDS = 8
_Words = npt.NDArray[np.uint64]


def mix(*parts: int) -> int:
    """Return a 64-bit hash of the integers `parts`, which is the same on every machine.

    Seeds are mixed by a hash, not by arithmetic, so that for example (seed 0, epoch 1) and (seed 1, epoch 0) give
    unrelated numbers.
    """
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Permutation:
    """The numbers from 0 to `size` - 1 in an order that `key` decides.

    A Feistel network permutes pairs (left, right) of numbers modulo a and b, where a * b is at least `size` and only
    slightly larger. Each round adds a function of the right number to the left, then a function of the left to the
    right. A pair stands for a number from 0 to a * b - 1. If this number is `size` or more, the pair passes through the
    network again until its number is below `size` (cycle walking, Black and Rogaway 2002, "Ciphers with arbitrary
    finite domains"). The functions are fast and not cryptographic.

    Args:
        size: positive, under 2**62.
        key: any integer.
    """

    def __init__(self, size: int, key: int) -> None:
        if not 0 < size < 2**62:
            raise ValueError(f"size must be positive and under 2**62, got {size}")
        self.size = size
        # The square root is rounded up, so that sizes 2 and 3 have b = 2. With b = 1, only rotations would be possible.
        self._right = math.isqrt(size - 1) + 1
        self._left = ceil_div(size, self._right)
        self._keys = [(np.uint64(mix(key, k, 0)), np.uint64(mix(key, k, 1))) for k in range(_ROUNDS)]

    def __call__(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Map (n,) places from 0 to `size` - 1 to the numbers at these places, (n,) int64.

        The number at a place does not depend on the other places of the call.
        """
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
    return np.minimum(total, total - np.uint64(modulus))  # total - modulus wraps around to a huge number if negative


def _scatter(numbers: _Words, key: np.uint64, below: int) -> _Words:
    """Hash each number to a number from 0 to `below` - 1. `numbers` and `below` are under 2**32."""
    x = numbers * np.uint64(0x9E3779B97F4A7C15) + key  # uint64 arrays wrap around without a warning
    x ^= x >> np.uint64(32)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x >>= np.uint64(32)
    x *= np.uint64(below)
    x >>= np.uint64(32)
    return x
