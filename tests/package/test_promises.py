"""docs/promises.md is the table of breaks.py, whose tests exist and whose breaks still apply."""

from __future__ import annotations

import ast

import pytest

from breaks import DOCUMENT, PROMISES, Break, Promise, document
from support import ROOT

ALL = [promise for promises in PROMISES.values() for promise in promises]
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
