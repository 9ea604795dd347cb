"""docs/promises.md is generated from the table in tests/broken, whose tests exist and whose breaks still apply."""

from __future__ import annotations

import ast
import shutil
import subprocess
from pathlib import Path

import pytest

from breaks import DOCUMENT, changed_since, chosen, document
from broken import PARTS, QUESTIONS, Break, Promise, promises
from support import ROOT

FOLDER = ROOT / "tests" / "broken"
ALL = promises()
BREAKS = [one for promise in ALL for one in promise.breaks]


def test_document_is_the_table() -> None:
    assert DOCUMENT.read_text() == document(), "run python tests/breaks.py --write"


def test_document_has_every_promise_in_a_short_row() -> None:
    rows = [line for line in document().splitlines() if line.startswith("| ")]
    assert len(rows) == len(ALL) + len(QUESTIONS)  # a heading for each question
    assert [row for row in rows if len(row) > 200] == []


def test_every_module_of_the_table_is_a_part() -> None:
    assert sorted(PARTS) == sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


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


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_table_has_short_lines(path: Path) -> None:
    assert max(len(line) for line in path.read_text().splitlines()) <= 120


def test_breaks_are_chosen_by_words_by_their_file_and_by_their_tests() -> None:
    one = ALL[0].breaks[0]
    assert [found for _, found in chosen([one.what], [])] == [one]
    assert {found.file for _, found in chosen([], ["fastclip/losses/stats.py"])} == {"fastclip/losses/stats.py"}
    file = "system/test_lazy.py"
    tested = [promise for promise in ALL if any(name.startswith(file) for name in promise.tests)]
    assert chosen([], [f"tests/{file}"]) == [(promise, one) for promise in tested for one in promise.breaks]
    assert chosen([""], []) == [(promise, one) for promise in ALL for one in promise.breaks]
    assert chosen([], []) == []


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_file_that_was_only_moved_has_not_changed(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    for name in ("kept", "changed", "moved", "moved and changed"):
        (tmp_path / f"{name}.py").write_text("".join(f"{name} {k}\n" for k in range(40)))
    git("init")
    git("add", ".")
    git("commit", "-m", "before")
    git("mv", "moved.py", "moved there.py")
    git("mv", "moved and changed.py", "there.py")
    for name in ("changed", "there", "new"):
        with (tmp_path / f"{name}.py").open("a") as file:
            file.write("another line\n")
    assert changed_since("HEAD", tmp_path) == {"changed.py", "there.py", "new.py"}
