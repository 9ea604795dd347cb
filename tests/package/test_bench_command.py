"""`fastclip bench` checks before it times, names providers that did not run, and writes the benchmark's rows."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from fastclip import bench
from fastclip.bench import run
from fastclip.cli import main
from support import ROOT, needs

SMALL = ["--device", "cpu", "--sizes", "64,96", "--D", "32", "--rounds", "3"]


def small(**options) -> list[bench.Measured]:
    return list(bench.measure(**{"sizes": [64], "dim": 32, "rounds": 3, "device": "cpu", **options}))


def providers(measured: bench.Measured) -> dict[str, dict]:
    return {row["provider"]: row for row in measured.rows}


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_rows_are_the_benchmarks(loss: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.csv"
    assert main(["bench", *SMALL, "--loss", loss, "--output", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{loss} loss, float32, D = 32; date") and f"torch {torch.__version__}" in out
    stored = (ROOT / "benchmarks" / "results" / "cpu.csv").read_text().splitlines()[0].split(",")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        assert [name for name in reader.fieldnames or () if name != "status"] == stored
        rows = list(reader)
    assert {row["N"] for row in rows} == {"64", "96"} and {row["rounds"] for row in rows} == {"3"}
    assert "fastclip_cpu" in {row["provider"] for row in rows}
    assert all(float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"]) for row in rows)
    assert sum("fastclip_cpu" in line for line in out.splitlines()) == 2


def test_report_draws_these_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("models")
    from benchmarks import plot

    path = tmp_path / "rows.csv"
    assert main(["bench", *SMALL, "--output", str(path)]) == 0
    monkeypatch.setattr(run, "available_bytes", lambda: 0.0)
    monkeypatch.setattr(run.Case, "dense_bytes", 1234.5 * 2**30)
    assert main(["bench", *SMALL[:2], "--sizes", "128", *SMALL[4:], "--output", str(path)]) == 0
    lines = plot.table(plot.read(path)).splitlines()
    assert len(lines) == 5 and all(float(line.split("|")[2]) > 0 for line in lines[2:])
    rows = [row | {"gpu": "a GPU"} for row in plot.read(path)]
    assert len(plot.gpu_table(rows).splitlines()) == 5  # no share of an unmeasured floor
    needs("train")
    import matplotlib.pyplot as plt

    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    plot.draw(plot.read(path), tmp_path / "figure.png")
    # memory of the dense formula, and of open_clip
    assert [text.xy for text in drawn[0].axes[2].texts] == [(128, 1234.5 * 1024)] * 2


def test_file_of_other_columns_is_refused_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "_rows", lambda *_: pytest.fail("it was measured"))
    path = tmp_path / "cpu.csv"
    path.write_bytes((ROOT / "benchmarks" / "results" / "cpu.csv").read_bytes())
    assert main(["bench", *SMALL, "--output", str(path)]) == 1
    assert "cpu.csv has other columns" in capsys.readouterr().err


def test_figures_are_medians_of_interleaved_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "open_clip_loss", lambda name: lambda: run.DENSE["softmax"])
    seconds = iter([0.004, 0.008, 0.002, 0.9, 0.9, 0.1, 0.005, 0.010, 0.004])
    monkeypatch.setattr(run, "wall_clock", lambda step: next(seconds))
    (measured,) = small()
    rows = providers(measured)
    assert [rows[name]["median_ms"] for name in ("dense", "open_clip", "fastclip_cpu")] == [5, 10, 4]
    assert [rows[name]["speedup_over_open_clip"] for name in ("dense", "open_clip", "fastclip_cpu")] == [2.0, 1.0, 4.0]
    head, *lines = bench.table(measured).splitlines()
    assert head.split()[-1] == "open_clip"
    assert lines[-1].split() == ["64", "fastclip_cpu", "4.00", "2.00", "to", "100.00", "4.00"]


def test_without_open_clip_the_formula_is_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "open_clip_loss", lambda name: None)
    seconds = iter([0.006, 0.002] * 3)
    monkeypatch.setattr(run, "wall_clock", lambda step: next(seconds))
    (measured,) = small()
    assert providers(measured).keys() == {"dense", "fastclip_cpu"}
    assert "x dense" in bench.table(measured) and bench.table(measured).split()[-1] == "3.00"


def test_wrong_loss_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = run.contrastive_loss
    monkeypatch.setattr(run, "contrastive_loss", lambda *args, **options: 1.001 * right(*args, **options))
    assert main(["bench", *SMALL]) == 1
    assert "N = 64, float32: fastclip_cpu: relative errors loss 1.0e-03" in capsys.readouterr().err
    monkeypatch.setattr(run, "contrastive_loss", right)
    monkeypatch.setitem(run.DENSE, "softmax", lambda image, text, scale: (image @ text.T).sum() * scale)
    assert providers(small()[0])["dense"]["status"].startswith("check failed: dense: relative errors")


def test_dense_losses_that_do_not_fit_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "available_bytes", lambda: 1.25 * 16 * 64**2 - 1)
    (measured,) = small()
    rows = providers(measured)
    assert rows["dense"]["status"] == "does not fit: 0.0 GiB" and rows["dense"]["median_ms"] == ""
    assert rows["fastclip_cpu"]["status"] == "" and rows["fastclip_cpu"]["median_ms"] > 0
    assert "does not fit" in bench.table(measured)


def test_out_of_memory_is_a_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*leaves: object) -> None:
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setitem(run.DENSE, "softmax", full)
    rows = providers(small()[0])
    assert rows["dense"]["status"] == "out of memory" and rows["fastclip_cpu"]["median_ms"] > 0


def test_nothing_but_the_reference_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "backends", lambda: {"cpu": "not built", "reference": "available"})
    monkeypatch.setattr(run, "available_bytes", lambda: 0.0)
    (measured,) = small()
    assert "run fastclip doctor" in providers(measured)["fastclip"]["status"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sizes", "1k"], "--sizes must be numbers of pairs separated by commas, such as 1024,4096, got 1k"),
        (["--sizes", "0"], "--sizes must be at least 1, got 0"),
        (["--sizes", "8,1"], "--sizes must be at least 2, got 1: the softmax loss of one pair is 0"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--device", "cuda"], "torch sees no GPU"),
    ],
)
def test_options_that_cannot_be(words, message, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", *words]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_bench_on_a_gpu(loss: str) -> None:
    (measured,) = small(loss=loss, sizes=[512], dim=64, device="cuda")
    ours = [row for name, row in providers(measured).items() if name.startswith("fastclip_")]
    assert ours and all(row["median_ms"] > 0 and row["peak_mib"] > 0 for row in ours)
    assert measured.about["gpu"] == torch.cuda.get_device_name()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_doctor_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert torch.cuda.get_device_name() in out and "float32 on cuda" in out
