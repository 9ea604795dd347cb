"""Write docs/reliability.md from the tests' markers: faults, what fastclip then does, and the tests that check it.

    python tests/reliability.py --write    write the document (by default it is printed)

A row is a test's `@pytest.mark.fault(what, promise)`; the tests are read, not imported. The table of files that are
opened is tests/opened.md.
"""

from __future__ import annotations

import argparse
import ast
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parent / "docs" / "reliability.md"
OPENED = TESTS / "opened.md"  # a test compares its modules with the package
# A section's rows are the tests whose files' paths begin so; the last section takes all others.
SECTIONS = {
    "data/": "Data",
    "search/test_filter": "Filtering and embedding",
    "search/": "Search",
    "training/": "Training",
    "models/": "Models and checkpoints",
    "": "Losses and statistics",
}


class Fault(NamedTuple):
    what: str
    promise: str
    test: str  # file::function


def faults(file: Path) -> list[Fault]:
    """Return the faults of a file in its order. Raises ValueError for a marker that is not two strings."""
    found = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        for decorator in node.decorator_list:
            if not (isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.fault"):
                continue
            try:
                what, promise = (ast.literal_eval(argument) for argument in decorator.args)
            except ValueError as error:
                raise ValueError(f"{file.name}::{node.name}: a fault is two strings, what and promise") from error
            found.append(Fault(what, promise, f"{file.relative_to(TESTS)}::{node.name}"))
    return found


def document() -> str:
    lines = [
        "# Reliability",
        "",
        "What goes wrong, what fastclip then does, and the test that makes it go wrong. `python tests/reliability.py",
        "--write` makes this file from the tests' markers, and a test compares them.",
    ]
    found = [fault for file in sorted(TESTS.rglob("test_*.py")) for fault in faults(file)]
    for prefix, section in SECTIONS.items():
        rows = [f for f in found if next(p for p in SECTIONS if f.test.startswith(p)) == prefix]
        lines += ["", f"## {section}", "", "| fault | what happens | test |", "|---|---|---|"]
        lines += [f"| {fault.what} | {fault.promise} | `{fault.test}` |" for fault in rows]
    lines += ["", "## Files that are opened", "", "No file is run, whatever it holds: what reads it, and where.", ""]
    lines += OPENED.read_text(encoding="utf-8").splitlines()
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/reliability.md")
    if parser.parse_args().write:
        DOCUMENT.write_text(document(), encoding="utf-8")
    else:
        print(document(), end="")


if __name__ == "__main__":
    main()
