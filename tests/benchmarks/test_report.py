"""benchmarks/REPORT.md contains what the rows contain, and nothing else."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from support import needs

needs("models")


from benchmarks import plot, report

ABOUT = {"date": "2026-01-02", "commit": "abc123", "machine": "abacus", "threads": "1", "isa": "beads"}
ABOUT |= {"python": "3.12", "torch": "2.8.0", "fastclip": "0.0.1", "open_clip": "3.3.0"}
OF_GPU = {"date": "2026-01-03", "commit": "def456", "gpu": "big one", "driver": "1", "cuda": "13", "triton": "4"}
OF_GPU |= {"torch": "2.8.0", "fastclip": "0.0.1", "open_clip": "3.3.0"}


def write(path: Path, about: dict[str, str], rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *about])
        writer.writeheader()
        writer.writerows({**row, **about} for row in rows)


def loss_row(
    N: int, provider: str, ms: object, times: object, peak: object = "", status: str = ""
) -> dict[str, object]:
    row = {"loss": "softmax", "mode": "both", "N": N, "D": 512 if N < 9000 else 768, "dtype": "bfloat16"}
    row |= {"provider": provider, "median_ms": ms, "p20_ms": ms, "p80_ms": ms}
    return {**row, plot.SHARE: "", plot.SPEED: times, plot.PEAK: peak, "status": status}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(
        tmp_path / "cuda.csv",
        OF_GPU,
        [
            loss_row(8192, "fastclip_cuda", 99, 9.99),
            loss_row(8192, "open_clip", 4.0, 1.0, 512),
            loss_row(65536, "fastclip_cuda", 40.25, "", 921.6),
            loss_row(65536, "open_clip", "", "", "", "does not fit: 160 GiB"),
            loss_row(8192, "fastclip_cuda", 2.0, 2.0, 64),  # measured again
        ],
    )
    row = {"model": "ViT-tiny", "batch_size": "64", "save_every": "1", "kind": "none", "median_ms": "482.9"}
    write(tmp_path / "checkpoints.csv", ABOUT, [row, {**row, "median_ms": "470.1"}])
    write(tmp_path / "walking.csv", ABOUT, [{"steps": "7", "pace": "brisk"}, {"steps": "8", "pace": ""}])
    return tmp_path


def test_report_is_that_of_the_rows() -> None:
    assert report.REPORT.read_text() == report.text(), "run `make report`"


def test_every_figure_of_the_report_is_there() -> None:
    named = [line.split("(")[1].split(")")[0] for line in report.text().splitlines() if line.startswith("![")]
    assert len(named) == 4
    for name in named:
        path = report.REPORT.parent / name
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 120_000


def test_last_row_of_a_case_counts(folder: Path) -> None:
    text = report.text(folder)
    assert "| 8,192 x 512 | 2.0 | 2.00 | - | 64 / 512 |" in text and "9.99" not in text
    assert "| ViT-tiny | 1 | none | 470 | " in text and "483" not in text


def test_what_was_not_measured_is_said(folder: Path) -> None:
    text = report.text(folder)
    assert "| 65,536 x 768 | 40.2 | - | - | 922 / does not fit: 160 GiB |" in text
    assert "## Training steps\n\nNot measured.\n" in text
    assert text.count("Not measured.") == 8  # the CPU's two losses, the GPU's sigmoid loss, five kinds of rows


def test_every_row_names_its_run(folder: Path) -> None:
    text = report.text(folder)
    first = "1. 2026-01-03, commit def456: big one, driver 1, cuda 13; torch 2.8.0, triton 4, fastclip 0.0.1, open_clip"
    assert first in text and "2. 2026-01-02, commit abc123: abacus, threads 1, beads; python 3.12" in text
    assert "| 7 | brisk | 2 |\n| 8 | - | 2 |" in text  # kinds of rows that the report does not know


def test_figure_shows_what_does_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("train")
    import matplotlib.pyplot as plt

    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    plot.draw(plot.read(folder / "cuda.csv"), folder / "figure.png")
    ((_, _, peak),) = [figure.axes for figure in drawn]
    assert [text.get_text() for text in peak.texts] == ["does not fit"]
    assert peak.texts[0].xy == (65536, 160 * 1024)
    assert [label.get_text() for label in peak.get_xticklabels()] == ["8,192\nD = 512", "65,536\nD = 768"]
