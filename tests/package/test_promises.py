"""docs/promises.md is the table in tests/broken, whose tests exist and whose breaks still apply."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from breaks import DOCUMENT, document
from broken import Break, Promise, promises
from support import ROOT

ALL = promises()
BREAKS = [one for promise in ALL for one in promise.breaks]


def test_document_is_the_table() -> None:
    assert DOCUMENT.read_text() == document(), "run python tests/breaks.py --write"


@pytest.mark.parametrize("promise", ALL, ids=lambda promise: promise.text[:50])
def test_promise_has_tests_and_a_break(promise: Promise) -> None:
    assert promise.tests and promise.breaks
    for name in promise.tests:
        file, function = name.split("::")
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


@pytest.mark.parametrize("one", BREAKS, ids=lambda one: one.what)
def test_break_applies(one: Break) -> None:
    assert (ROOT / one.file).read_text().count(one.old) == 1, f"{one.file} has changed: {one.old}"
    assert one.new != one.old


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "broken").glob("*.py")), ids=lambda path: path.name)
def test_table_has_short_lines(path: Path) -> None:
    assert max(len(line) for line in path.read_text().splitlines()) <= 120
