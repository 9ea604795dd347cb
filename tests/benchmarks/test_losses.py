"""The CPU benchmark: its providers agree, it runs, and its figure and table show its rows."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from support import ROOT, needs

needs("bench", "models")


from benchmarks import plot
from benchmarks.harness import Case, Timings, append, rows
from benchmarks.losses import providers as losses

N, D = 64, 512  # the benchmark's D, so that compiled code is shared with it

# Two sizes and dtypes. open_clip has no row at N = 2048, so no comparison is possible there. The first row of fastclip
# is measured again further down.
ROWS = """
forward, 1024, float32,  fastclip,  1.0,  90.0, 3.0,
both,    1024, float32,  fastclip,  99.0, 11.0, 1.11, 99.0
both,    1024, float32,  floor,     18.0, 100.0, 2.2,
both,    1024, float32,  open_clip, 40.0, 45.0, 1.0,  32.4
both,    1024, float32,  fastclip,  20.0, 90.0, 2.0,  8.6
both,    2048, float32,  fastclip,  1234.5, ,   ,     16.2
both,    1024, bfloat16, fastclip,  25.0, 80.0, 5.0,
both,    1024, bfloat16, open_clip, 125.0, 16.0, 1.0,
"""
ABOUT = {"date": "2026-01-02", "machine": "abacus, 2 cores", "threads": "2", "isa": "beads"}
ABOUT |= {"torch": "2.8.0", "fastclip": "0.0.1", "open_clip": "3.3.0"}


def write(path: Path, text: str = ROWS) -> Path:
    columns = ["mode", "N", "dtype", "provider", "median_ms", "floor_percent", plot.SPEED, plot.PEAK]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["loss", *columns, "D", *ABOUT])
        writer.writeheader()
        for line in text.strip().splitlines():
            cells = (cell.strip() for cell in line.split(","))
            writer.writerow({**dict(zip(columns, cells, strict=True)), "loss": "softmax", "D": "512", **ABOUT})
    return path


def run_module(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_table_says_what_the_last_rows_say(tmp_path: Path) -> None:
    lines = plot.table(plot.read(write(tmp_path / "rows.csv"))).splitlines()
    assert lines[2:] == ["| 1,024 | 20.0 | 2.00 | 90 | 9 / 32 |", "| 2,048 | 1,234.5 | - | - | 16 / - |"]
    assert len({line.count("|") for line in lines}) == 1


def test_figure_shows_the_last_rows_and_leaves_gaps(tmp_path: Path, monkeypatch) -> None:
    needs("train")
    import matplotlib.pyplot as plt

    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    output = tmp_path / "made" / "figure.png"
    plot.draw(plot.read(write(tmp_path / "rows.csv")), output)
    assert output.read_bytes().startswith(b"\x89PNG")

    (figure,) = drawn
    speed, share, peak, speed_bf16, _, peak_bf16 = figure.axes
    shown = {line.get_label(): list(line.get_ydata()) for line in speed.get_lines()}
    assert list(shown) == ["fastclip", "open_clip", plot.LABELS["floor"]]
    assert shown["fastclip"][0] == 2.0 and math.isnan(shown["fastclip"][1])
    assert share.get_lines()[1].get_ydata()[0] == 45.0
    assert list(peak.get_lines()[0].get_ydata()) == [8.6, 16.2]
    assert speed_bf16.get_lines()[0].get_ydata()[0] == 5.0
    assert peak_bf16.get_yscale() == "linear"  # no memory was measured
    assert all(text in figure.get_suptitle() for text in ("abacus, 2 cores", "threads: 2", "torch 2.8.0", "D = 512"))


def test_table_from_the_command_line(tmp_path: Path) -> None:
    path = str(write(tmp_path / "rows.csv"))
    table = run_module("benchmarks.report", "--rows", path, "--table", "softmax")
    assert table.returncode == 0 and "| 1,024 | 20.0 |" in table.stdout, table.stderr
    missing = run_module("benchmarks.report", "--rows", str(tmp_path / "none.csv"), "--table", "softmax")
    assert missing.returncode == 2 and "none.csv does not exist" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_plot_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("mode,N,speed\nboth,8,1\n")
    with pytest.raises(ValueError, match=r"lacks the columns loss, D, dtype, provider.*not rows"):
        plot.read(path)
    with pytest.raises(ValueError, match="no rows of the softmax loss in mode both"):
        plot.read(write(path, "forward, 1024, float32, fastclip, 1.0, 90.0, 3.0,"))


PROVIDERS = [(loss, name) for loss in losses.MODES for name in losses.cpu_losses(loss)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("loss", "provider"), PROVIDERS)
def test_provider_agrees_with_open_clip(loss: str, provider: str, dtype: str) -> None:
    found = losses.cpu_losses(loss)
    losses.check(losses.leaves_of(Case(loss, "both", N, D, dtype)), {provider: found[provider]}, found[losses.PEER])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_check_sees_wrong_losses(dtype: str) -> None:
    right = losses.cpu_losses("softmax")[losses.PEER]
    leaves = losses.leaves_of(Case("softmax", "both", N, D, dtype))
    with pytest.raises(AssertionError, match="value is off"):
        losses.check(leaves, {"value is off": lambda image, text, scale: 1.1 * right(image, text, scale)}, right)
    with pytest.raises(AssertionError, match="one direction"):
        losses.check(
            leaves,
            {"one direction": lambda image, text, scale: right(image, text.detach(), scale) + 0 * text.sum()},
            right,
        )


def test_providers_are_those_that_can_run() -> None:
    assert ("linear_cross_entropy" in losses.cpu_losses("softmax")) == hasattr(F, "linear_cross_entropy")
    assert losses.named(None) == list(losses.cpu_losses("softmax"))
    assert losses.named("fastclip") == ["fastclip"]
    with pytest.raises(ValueError, match="no provider clipfast here"):
        losses.named("fastclip,clipfast")

    everything, room = tuple(losses.cpu_losses("softmax")), 1e12
    assert tuple(losses.selected(Case("softmax", "both", N, D, "float32"), everything, room)) == everything
    for mode in ("forward", "backward"):
        found = set(losses.selected(Case("softmax", mode, N, D, "float32"), everything, room))
        assert found == set(everything) - losses.WHOLE_STEP_ONLY
    # Dense logits and their gradients need five times 4 N^2 bytes, the floor twice
    case = Case("softmax", "both", 1000, D, "float32")
    assert not set(losses.selected(case, everything, 27e6)) & losses.DENSE
    assert losses.PEER in losses.selected(case, everything, 29e6)


def test_rows_leave_out_what_was_not_run(tmp_path: Path) -> None:
    timings = Timings({"fastclip": [0.25, 0.5, 1.0]})
    (row,) = rows(Case("softmax", "both", N, D, "float32"), timings, floor="floor", peer="open_clip", peak_mib={})
    assert row["median_ms"] == 500 and row["floor_percent"] == row["speedup_over_open_clip"] == row["peak_mib"] == ""
    append(tmp_path / "rows.csv", [row])
    assert plot.table(plot.read(tmp_path / "rows.csv")).splitlines()[-1] == "| 64 | 500.0 | - | - | - / - |"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured on Linux only")
def test_peak_memory_is_the_step_alone() -> None:
    from benchmarks.losses.peak_memory import measure_in_child

    # A matrix of float32 logits has 4 MiB at N = 1024. open_clip holds four at once, and 4 MiB more allow for code that
    # is loaded meanwhile. Kept pages, or other memory counted by mistake, would be far more.
    assert 16 - 0.5 <= measure_in_child(Case("softmax", "both", 1024, 128, "float32"), "open_clip") <= 16 + 4


def test_benchmark_leaves_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    options = ["--device", "cpu", "--sizes", str(N), "--rows", str(path), "--no-peak"]
    options += ["--benchmark-enable", "--benchmark-only"]
    done = run_module("pytest", "benchmarks", "-q", "-p", "no:cacheprovider", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    for loss, modes in losses.MODES.items():
        for mode in modes:
            wanted = losses.selected(Case(loss, mode, N, D, "float32"), losses.named(None), 1e12)
            for dtype in ("float32", "bfloat16"):
                chosen = [row for row in found if (row["loss"], row["mode"], row["dtype"]) == (loss, mode, dtype)]
                assert sorted(row["provider"] for row in chosen) == sorted({"floor", *wanted})
        assert len(plot.table(plot.read(path, loss)).splitlines()) == 3
    for row in found:
        assert row["N"] == str(N) and int(row["rounds"]) == 25 and row["torch"] == torch.__version__
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["speedup_over_open_clip"]) > 0 and row["peak_mib"] == ""


def test_checkpoints_leave_rows(tmp_path: Path) -> None:
    needs("train")
    path = tmp_path / "rows.csv"
    small = ["--batch-size", "8", "--steps", "2", "--save-every", "1", "--rounds", "1", "--folder", str(tmp_path)]
    done = run_module("benchmarks.checkpoints", *small, "--rows", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["kind"] for row in found] == ["none", "background", "at once"]
    assert found[0]["extra_ms_a_step"] == "0.0" and all(float(row["median_ms"]) > 0 for row in found)
    assert all(float(row["checkpoint_mib"]) > 20 for row in found)
