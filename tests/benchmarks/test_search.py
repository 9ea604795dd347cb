"""The benchmark of search writes its rows."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from support import needs

needs("train")


from benchmarks import search


def test_benchmark_of_search_writes_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.csv"
    words = f"--pictures 200 --dim 16 --jpegs 4 --model ViT-tiny --workers 1 --rounds 3 --rows {rows}"
    monkeypatch.setattr(sys, "argv", ["search", *words.split()])
    search.main()
    with rows.open(newline="") as file:
        found = {row["what"]: row for row in csv.DictReader(file)}
    assert list(found) == ["query", "read", "start", "index ViT-tiny"]
    assert found["query"]["pictures"] == "200" and found["index ViT-tiny"]["pictures"] == "4"
    assert all(float(row["median_s"]) > 0 and row["commit"] for row in found.values())
    assert len(capsys.readouterr().out.splitlines()) == 4
