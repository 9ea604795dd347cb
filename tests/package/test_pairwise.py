"""A run without --full covers every pair of levels of a `pairwise` matrix, and runs no case marked `full`."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from support import ROOT
from support.pairwise import cover

MATRIX = """
import pytest

@pytest.fixture(params=["seed1", "seed2"])
def seed(request): ...

@pytest.mark.pairwise
@pytest.mark.parametrize("kind", ["one", "two", "three"])
@pytest.mark.parametrize(("scale", "bias"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_matrix(kind, scale, bias, seed): ...

@pytest.mark.pairwise
@pytest.mark.parametrize("kind", ["one", "two", "three"])
def test_one_axis(kind): ...

@pytest.mark.parametrize("kind", ["one", "two"])
@pytest.mark.parametrize("scale", [0, 1])
@pytest.mark.parametrize("bias", [0, 1])
def test_not_marked(kind, scale, bias): ...

@pytest.mark.pairwise
def test_no_axis(): ...

@pytest.mark.parametrize("side", [1, pytest.param(9, marks=pytest.mark.full)])
def test_slow(side): ...
"""


@pytest.mark.parametrize("sizes", [(3, 4, 2), (9, 7, 5), (2, 2, 2, 2, 2), (6, 4), (5,)], ids=str)
def test_every_pair_of_levels_is_covered(sizes: tuple[int, ...]) -> None:
    rows = [dict(zip("abcdef", levels)) for levels in itertools.product(*map(range, sizes))]
    chosen = cover(rows)
    assert chosen == sorted(set(chosen)) == cover(rows)
    for k in (1, 2):
        for axes in itertools.combinations("abcdef"[: len(sizes)], k):
            levels = [{tuple(row[axis] for axis in axes) for row in some} for some in (rows, [rows[i] for i in chosen])]
            assert levels[0] == levels[1]
    most = sorted(sizes)[-2:]
    assert len(chosen) <= 1.5 * most[0] * most[-1] + 1 if len(sizes) > 2 else len(chosen) == len(rows)


def test_pairs_that_no_row_has_are_not_asked_for() -> None:
    rows = [{"a": a, "b": b, "c": c} for a, b, c in itertools.product(range(3), repeat=3) if a <= b]
    found = [rows[k] for k in cover(rows)]
    assert len(found) < len(rows) and {(x["a"], x["b"]) for x in found} == {(x["a"], x["b"]) for x in rows}


def test_selection_is_covered_and_full_is_all(tmp_path: Path) -> None:
    """The cases that -k, -m or a name select form the matrix whose pairs are covered, so that a selected case runs."""
    (tmp_path / "test_it.py").write_text(MATRIX)
    asked = {
        "all": [],
        "full": ["--full"],
        "few": ["-k", "test_matrix and one and seed1"],
        "named": ["test_it.py::test_matrix[seed1-1-1-two]", "test_it.py::test_slow[9]"],
    }
    calls = [
        (name, ["--collect-only", "-q", "-p", "conftest", "-p", "no:cacheprovider", *options])
        for name, options in asked.items()
    ]
    script = f"import pytest\nfor name, call in {calls}:\n    print('>', name)\n    pytest.main(call)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "PYTEST_ADDOPTS": ""}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    found: dict[str, Counter[str]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("> "):
            found[line[2:]] = Counter()
        elif "::" in line:
            list(found.values())[-1][line.partition("::")[2].partition("[")[0]] += 1
    whole = {"test_one_axis": 3, "test_not_marked": 8, "test_no_axis": 1}
    assert found["full"] == {"test_matrix": 24, "test_slow": 2, **whole}, done.stdout + done.stderr
    assert {**found["all"], "test_matrix": 0} == {"test_matrix": 0, "test_slow": 1, **whole}
    assert 12 <= found["all"]["test_matrix"] < 18  # each kind with each of the four (scale, bias)
    assert found["few"] == {"test_matrix": 4} and found["named"] == {"test_matrix": 1, "test_slow": 1}
