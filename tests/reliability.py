"""Generate docs/reliability.md from the markers of the tests: what goes wrong, what fastclip does, which test holds it.

    python tests/reliability.py            print the document
    python tests/reliability.py --write    write the document

A row is the `@pytest.mark.fault(what, promise)` of a test; the tests are parsed, not imported. The table of files that
the package opens is tests/opened.md.
"""

from __future__ import annotations

import argparse
import ast
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parent / "docs" / "reliability.md"
OPENED = TESTS / "opened.md"  # the table of files that the package opens; a test compares its modules with the package
# Section of a row, by the beginning of its test's path; the last section takes all other rows.
SECTIONS = {
    "data/": "Data",
    "training/": "Training",
    "system/": "Checkpoints, outputs and disks",
    "package/": "Commands",
    "models/": "Models",
    "embedding/": "Evaluation",
    "search/": "Search",
    "curation/": "Filtering and embedding",
    "": "Losses",
}


class Fault(NamedTuple):
    what: str
    promise: str
    test: str  # file::function


def faults(file: Path) -> list[Fault]:
    """Return the faults of a file of tests, in its order; raise ValueError for a marker that is not two strings."""
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
        "A test provokes each fault in these tables and checks what fastclip does. For example, this run",
        "may be killed with kill -9 again and again. If the command is started once more, it resumes, and the run ends",
        "with the losses of a run that never stopped (bit for bit; on a GPU this requires `--deterministic`).",
        "",
        "```console",
        "$ fastclip train --config run.yaml --save-every 500 --resume auto",
        "```",
        "",
        'A sample that is *counted by cause* appears in the log under its cause, such as "truncated image"; the',
        "metrics have the number of all such samples. [Training](training.md#data-faults) lists the causes. A",
        "checkpoint is *intact* if its files match its manifest.",
        "",
        "`python tests/reliability.py --write` generates this page from the tests, and a test compares the two.",
    ]
    found = [fault for file in sorted(TESTS.rglob("test_*.py")) for fault in faults(file)]
    for prefix, section in SECTIONS.items():
        rows = [f for f in found if next(p for p in SECTIONS if f.test.startswith(p)) == prefix]
        lines += ["", f"## {section}", "", "| fault | what happens | test |", "|---|---|---|"]
        lines += [f"| {fault.what} | {fault.promise} | `{fault.test}` |" for fault in rows]
    lines += ["", "## Files that are opened", ""]
    lines += [
        "Data and checkpoints are never executed, whatever they contain. The table states what reads each file.",
        "",
    ]
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
