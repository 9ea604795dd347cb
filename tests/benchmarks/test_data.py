"""The benchmark of data loading: its providers read the same samples, and it writes its rows."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

from support import needs

needs("bench", "train")


from benchmarks import data

CASE = data.Case(64, 48, samples=12, shards=2, batch_size=4, workers=0)


def test_benchmark_of_data_times_passes_over_the_same_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads, rows = torch.get_num_threads(), tmp_path / "rows.csv"
    words = "--sizes 64x48 --samples 12 --shards 2 --batch-size 4 --workers 0 --rounds 2"
    monkeypatch.setattr(sys, "argv", ["data", *words.split(), "--rows", str(rows)])
    try:
        data.main()
    finally:
        torch.set_num_threads(threads)
    with rows.open(newline="") as file:
        found = {row["provider"]: row for row in csv.DictReader(file)}
    assert set(found) == set(data.PROVIDERS)
    for row in found.values():
        assert float(row["samples_per_second"]) == pytest.approx(12 / float(row["median_s"]), rel=0.1)
        assert row["rounds"] == "2" and float(row["cpu_ms_per_sample"]) > 0
    assert float(found["webdataset"]["speedup_over_webdataset"]) == 1
    assert len(capsys.readouterr().out.splitlines()) == len(data.PROVIDERS)


def test_benchmark_of_data_refuses_a_provider_that_reads_other_samples(tmp_path: Path) -> None:
    pattern = data.write_shards(CASE, tmp_path)
    whole = data.ours(CASE, pattern, scaled=True)
    half = data.ours(data.Case(64, 48, 8, 2, 4, 0), pattern, scaled=True)
    data.check({"fastclip": whole}, CASE)
    with pytest.raises(RuntimeError, match="half reads 8 of 12 samples"):
        data.check({"fastclip": whole, "half": half}, CASE)
