"""The benchmark of other packages' losses compares values and writes its rows."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from support import needs

needs("train")
pytest.importorskip("sentence_transformers")
pytest.importorskip("pytorch_metric_learning")

from benchmarks import recipes


def run(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["recipes", *words.split()])
    recipes.main()


def test_every_loss_equals_its_peer_and_has_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "peak", lambda *args: 0.0)
    run(monkeypatch, f"--sizes 48 --dim 64 --rounds 2 --rows {tmp_path / 'rows.csv'}")
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["loss"] for row in rows[::2]] == list(recipes.RECIPES)
    assert all(row["provider"] == "fastclip" for row in rows[::2])
    assert all(float(row["speedup_over_peer"]) == 1.0 for row in rows[1::2])


def test_another_value_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wrong = recipes.RECIPES["one direction"]._replace(ours=lambda: lambda *x: 1.01 * recipes.one_direction(*x))
    monkeypatch.setitem(recipes.RECIPES, "one direction", wrong)
    with pytest.raises(AssertionError, match="differ"):
        recipes.measure("one direction", 16, 8, 1, "cpu")


def test_peak_of_the_dense_loss_is_larger(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MB", "2")  # the next lines run in other processes
    ours, theirs = (recipes.peak("one direction", which, 1500, 16) for which in ("fastclip", "peer"))
    assert 0 < ours < 6 < 8.5 < theirs
