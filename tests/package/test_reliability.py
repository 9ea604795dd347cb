"""docs/reliability.md is generated from the tests' markers."""

from __future__ import annotations

from pathlib import Path

import pytest

from reliability import DOCUMENT, TESTS, document, faults


def test_document_is_what_the_markers_say() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "run python tests/reliability.py --write"


def test_every_marker_is_a_row() -> None:
    """Every marker has a row. A decorator in another form, such as on a class, would have none."""
    text = document()
    for file in TESTS.rglob("test_*.py"):
        if file.name != Path(__file__).name:
            assert file.read_text(encoding="utf-8").count("pytest.mark.fault(") == len(faults(file)), file.name
        for fault in faults(file):
            assert f"| {fault.what} | {fault.promise} | `{fault.test}` |" in text
            assert "|" not in fault.what + fault.promise and "\n" not in fault.what + fault.promise


def test_marker_of_another_form_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text('@pytest.mark.fault("a", WORDS)\ndef test_b(): ...\n')
    with pytest.raises(ValueError, match=r"test_a\.py::test_b: a fault is two strings"):
        faults(tmp_path / "test_a.py")
