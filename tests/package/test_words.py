"""The house's rules of language: docstrings that stand alone, a short README, pages that begin with an example."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import ROOT
from support.pages import PAGES, name

README_LINES = 200
FIRST_EXAMPLE = 10  # the last line at which it may begin
SOURCES = sorted(
    [
        *(
            path
            for folder in ("fastclip", "triton_kernels", "benchmarks", "tests", "examples", "docs")
            for path in (ROOT / folder).rglob("*.py")
        ),
        ROOT / "setup.py",
    ]
)
# Words that begin a fragment: such a sentence has no subject, or its subject is in the code
_FRAGMENT = re.compile(
    r"(As|At|By|From|How|In|Likewise|Of|On|To|What|Where|Whether|Which|Who|Whose|Why|With|Those|These|They|It|Its|Also|And"
    r"|But|Or|Not|Nothing|No|Only|Same)\b"
)
_PRONOUN = re.compile(r"(?:^|(?<=[.;:] )|(?<=\n\n))`{0,2}(found|told|own|some)\b", re.IGNORECASE)
_CODE = re.compile(r"``[^`]*``|`[^`]*`")
# The list of promises is generated, and has nothing to try
_GUIDES = [path for path in PAGES if path.parent.name == "docs" and path.stem != "promises"]


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring of a module, those of its classes, functions and attributes included."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            match statement:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield statement.lineno, inspect.cleandoc(text)


def faults(docstring: str) -> list[str]:
    """Rules that a docstring breaks."""
    broken = [f"begins with {word[1]!r}"] if (word := _FRAGMENT.match(docstring)) else []
    broken += [f"{word[1]!r} is a subject" for word in _PRONOUN.finditer(docstring)]
    semicolons = _CODE.sub("", docstring).count(";")
    return broken + ([f"{semicolons} semicolons"] if semicolons > 1 else [])


@pytest.mark.parametrize("folder", sorted({path.relative_to(ROOT).parts[0] for path in SOURCES}))
def test_docstrings_stand_alone(folder: str) -> None:
    files = [path for path in SOURCES if path.relative_to(ROOT).parts[0] == folder]
    broken = [
        f"{path.relative_to(ROOT)}:{line}: {', '.join(reasons)}: {text.splitlines()[0]}"
        for path in files
        for line, text in docstrings(path.read_text(encoding="utf-8"))
        if (reasons := faults(text))
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("docstring", "count"),
    [
        ("Of this machine's processes.", 1),
        ("What the kernels share.", 1),
        ("Return the rows. Found is the checkpoint.", 1),
        ("Return the rows; the columns; the scale.", 1),
        ("Return the rows; `a; b` is code.", 0),
        ("Ownership of a folder by one process.", 0),
    ],
)
def test_rules_notice_a_fragment(docstring: str, count: int) -> None:
    assert len(faults(docstring)) == count


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


@pytest.mark.parametrize("page", _GUIDES, ids=name)
def test_pages_begin_with_an_example(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert any(line.startswith("```") for line in lines[:FIRST_EXAMPLE]), f"{name(page)}: {lines[:FIRST_EXAMPLE]}"
