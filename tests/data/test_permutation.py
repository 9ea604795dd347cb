"""The shuffle of an epoch, computed one number at a time."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from support import needs

needs("models")

from fastclip.data.loading.order import Order
from fastclip.data.loading.permutation import Permutation


def numbers(size: int, key: int) -> list[int]:
    return Permutation(size, key)(np.arange(size)).tolist()


@pytest.mark.parametrize("size", [*range(1, 20), 64, 97, 1000, 1024, 1025, 65536, 99_991])
def test_permutation_has_every_number_once(size: int) -> None:
    for key in (0, 1, -5, 2**64 - 1):
        assert sorted(numbers(size, key)) == list(range(size))


def test_permutation_of_many_does_not_depend_on_how_it_is_asked() -> None:
    size = 400_000_007  # a prime
    shuffle, places = Permutation(size, 3), np.array([0, 1, size - 1, 123_456_789, size // 2])
    whole = shuffle(places)
    assert whole.dtype == np.int64 and whole.min() >= 0 and whole.max() < size
    assert [shuffle(places[k : k + 1]).item() for k in range(5)] == whole.tolist()
    some = shuffle(np.arange(200_000_000, 200_100_000))
    assert len(np.unique(some)) == 100_000 and some.max() < size
    huge = Permutation(2**62 - 1, 3)(np.arange(1000))
    assert len(np.unique(huge)) == 1000 and huge.min() >= 0 and huge.max() < 2**62 - 1


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_permutation_has_every_order_equally_often(size: int) -> None:
    orders = math.factorial(size)
    counts = Counter(tuple(numbers(size, key)) for key in range(40 * orders))
    chi_square = sum((counts[order] - 40) ** 2 / 40 for order in itertools.permutations(range(size)))
    free = orders - 1
    assert chi_square < free + 4 * math.sqrt(2 * free)


def test_permutation_is_shuffled_like_a_random_one() -> None:
    size, keys = 1000, 100
    orders = np.array([numbers(size, key) for key in range(keys)])
    displacement = np.abs(orders - np.arange(size)).mean() / size
    assert displacement == pytest.approx(1 / 3, abs=0.005)
    adjacent = (np.abs(np.diff(orders, axis=1)) == 1).sum(1).mean()  # 2 (n - 1) / n in a random order
    assert adjacent == pytest.approx(2, abs=0.6)
    assert abs(np.corrcoef(orders[:, :-1].ravel(), orders[:, 1:].ravel())[0, 1]) < 0.02
    fixed = (orders == np.arange(size)).sum(1).mean()
    assert fixed == pytest.approx(1, abs=0.5)
    halves = (orders[:, : size // 2] < size // 2).mean(1)  # shards of the first half among those that come first
    assert halves.mean() == pytest.approx(0.5, abs=0.01) and halves.std() < 0.03


@pytest.mark.parametrize("size", [0, -1, 2**62])
def test_permutation_of_nothing_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="size must be positive"):
        Permutation(size, 0)


def test_order_of_billions_takes_no_memory() -> None:
    order = Order(5_000_000_000, 4096, seed=1)
    drawn = order.draws(1_000_000, 0, 4096)
    assert len({draw.sample for draw in drawn}) == 4096
    assert max(draw.sample for draw in drawn) > 4_000_000_000
