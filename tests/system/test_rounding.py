"""Division that rounds up is exact for integers that floats cannot represent."""

from __future__ import annotations

import math

import pytest

from fastclip.system.rounding import ceil_div


@pytest.mark.parametrize(
    ("a", "b", "quotient"), [(0, 3, 0), (1, 3, 1), (3, 3, 1), (4, 3, 2), (2**60 + 1, 2, 2**59 + 1), (-4, 3, -1)]
)
def test_quotient_is_the_smallest_integer_that_is_not_below(a: int, b: int, quotient: int) -> None:
    assert ceil_div(a, b) == quotient
    assert (quotient - 1) * b < a <= quotient * b


def test_floats_would_not_do() -> None:
    assert ceil_div(2**60 + 1, 2) != math.ceil((2**60 + 1) / 2)
