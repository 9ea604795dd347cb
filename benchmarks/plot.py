"""Figures and tables of the losses from the benchmark's rows alone, for benchmarks/report.py."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SPEED, SHARE, PEAK = "speedup_over_open_clip", "floor_percent", "peak_mib"
COLUMNS = ["loss", "mode", "N", "D", "dtype", "provider", "median_ms", SHARE, SPEED, PEAK]
VERSIONS = ["torch", "fastclip", "open_clip"]
CPU_COLUMNS = ["date", "machine", "threads", "isa", *VERSIONS]
GPU_COLUMNS = ["date", "gpu", "driver", "cuda", "triton", *VERSIONS]

# Colours that the colour-blind can distinguish (Okabe and Ito, 2008; Tol, 2021). The floor is a bound, not a peer
STYLES: dict[str, dict[str, str]] = {
    "fastclip": {"color": "#D55E00", "marker": "o"},
    "fastclip_cuda": {"color": "#D55E00", "marker": "o"},
    "fastclip_cpu": {"color": "#D55E00", "marker": "o"},
    "fastclip_triton": {"color": "#E69F00", "marker": "v"},
    "open_clip": {"color": "#0072B2", "marker": "s"},
    "open_clip_compiled": {"color": "#56B4E9", "marker": "^"},
    "linear_cross_entropy": {"color": "#009E73", "marker": "D"},
    "cut_cross_entropy": {"color": "#CC79A7", "marker": "P"},
    "inf_cl": {"color": "#882255", "marker": "X"},
    "memeff": {"color": "#000000", "marker": "*"},
    "siglip_kernel": {"color": "#CC79A7", "marker": "P"},
    "dense": {"color": "#999999", "marker": "x"},
    "floor": {"color": "#777777", "linestyle": "--"},
}
LABELS = {
    "open_clip_compiled": "open_clip, torch.compile",
    "linear_cross_entropy": "torch linear_cross_entropy",
    "floor": "matrix products alone",
}

TITLES = {"softmax": "CLIP's contrastive loss", "sigmoid": "SigLIP's sigmoid loss"}

Row = dict[str, str]


def read(path: Path, loss: str = "softmax") -> list[Row]:
    """Read the rows of a loss in mode `both`. The last row in the file counts for each case and provider."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: `make bench` writes it")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        about = GPU_COLUMNS if "gpu" in columns else CPU_COLUMNS
        if missing := [name for name in COLUMNS + about if name not in columns]:
            raise ValueError(f"{path} lacks the columns {', '.join(missing)}: these are not rows of the benchmark")
        wanted = [row for row in reader if (row["loss"], row["mode"]) == (loss, "both")]
        last = {(row["N"], row["D"], row["dtype"], row["provider"]): row for row in wanted}
    if not last:
        raise ValueError(f"{path} has no rows of the {loss} loss in mode both")
    return sorted(last.values(), key=lambda row: (int(row["N"]), int(row["D"])))


def _number(row: Row | None, column: str) -> float:
    return float(row[column]) if row and row[column] else float("nan")


def _all(rows: list[Row], column: str) -> str:
    values = {row[column] for row in rows if row.get(column)}
    return " / ".join(sorted(values, key=lambda value: (len(value), value) if value.isdecimal() else (0, value)))


def _about(rows: list[Row]) -> str:
    versions = ", ".join(f"{name} {_all(rows, name)}" for name in VERSIONS)
    if "gpu" in rows[0]:
        machine = f"{_all(rows, 'gpu')}, driver {_all(rows, 'driver')}, CUDA {_all(rows, 'cuda')}"
        machine += f", triton {_all(rows, 'triton')}"
    else:
        machine = f"{_all(rows, 'machine')}, threads: {_all(rows, 'threads')}, {_all(rows, 'isa')}"
    return f"{machine}\n{versions}; {_all(rows, 'date')}, commit {_all(rows, 'commit')}"


def draw(rows: list[Row], output: Path) -> None:
    """Draw speed, share of the floor and peak memory against N, with one line of panels per dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    dtypes = sorted({row["dtype"] for row in rows}, key=lambda dtype: (dtype != "float32", dtype))
    present = {row["provider"] for row in rows}
    providers = [name for name in STYLES if name in present] + sorted(present - set(STYLES))

    figure, lines = plt.subplots(
        len(dtypes), 3, figsize=(13, 1.9 + 2.9 * len(dtypes)), sharex=True, squeeze=False, layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    for (speed, share, peak), dtype in zip(lines, dtypes):
        by_size = {(int(row["N"]), row["provider"]): row for row in rows if row["dtype"] == dtype}
        for panel, column in ((speed, SPEED), (share, SHARE), (peak, PEAK)):
            for name in providers:
                _line(panel, by_size, name, column)
        speed.set(title=f"{dtype}: speed (higher is better)", ylabel="times as fast as open_clip", ylim=(0, None))
        share.set(
            title=f"{dtype}: share of the floor (higher is better)", ylabel="% of the floor's speed", ylim=(0, None)
        )
        peak.set(title=f"{dtype}: peak memory (lower is better)", ylabel="MiB beyond features and gradients")
        if any(_number(row, PEAK) > 0 for row in by_size.values()):  # a log axis needs a positive value
            peak.set_yscale("log")
            peak.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    for panel in lines.flat:
        _dress(panel, sorted({(int(row["N"]), int(row["D"])) for row in rows}))
    figure.align_ylabels()
    title = f"{TITLES[rows[0]['loss']]}, forward and backward, D = {_all(rows, 'D')}"
    figure.suptitle(f"{title}\n{_about(rows)}", fontsize=10.5, linespacing=1.4)
    figure.legend(*lines[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    _save(figure, output)
    plt.close(figure)


def _line(panel: Any, by_size: dict[tuple[int, str], Row], name: str, column: str) -> None:
    """Draw a provider's figures, as hollow markers where it is only known that they do not fit."""
    if name == "floor" and column == PEAK:
        return  # it has no step to measure
    style = {"marker": "", "linestyle": "-", "linewidth": 1.8, "markersize": 5.5, **STYLES.get(name, {})}
    sizes = sorted({N for N, _ in by_size})
    cells = [by_size.get((N, name)) for N in sizes]
    panel.plot(sizes, [_number(cell, column) for cell in cells], label=LABELS.get(name, name), **style)
    for N, cell in zip(sizes, cells):
        needed = re.fullmatch(r"does not fit: ([\d.,]+) GiB", (cell or {}).get("status", ""))
        if needed and column == PEAK:
            mib = 1024 * float(needed[1].replace(",", ""))
            panel.plot([N], [mib], color=style["color"], marker=style["marker"], markersize=7, fillstyle="none")
            panel.annotate(
                "does not fit", (N, mib), (-8, 0), textcoords="offset points", ha="right", va="center", size=8
            )


def _dress(panel: Any, sizes: list[tuple[int, int]]) -> None:
    from matplotlib.ticker import NullLocator

    widths = {D for _, D in sizes}
    labels = [f"{N:,}" + (f"\nD = {D:,}" if len(widths) > 1 else "") for N, D in sizes]
    panel.set_xscale("log", base=2)
    panel.set_xticks([N for N, _ in sizes], labels)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.title.set_fontsize(11)
    panel.grid(color="#dddddd", linewidth=0.7)
    panel.spines[["top", "right"]].set_visible(False)
    if panel.get_subplotspec().is_last_row():
        panel.set_xlabel("batch size N")


def _save(figure: Any, output: Path) -> None:
    """Save the figure with a palette of 64 colours, which takes a third of the bytes."""
    from io import BytesIO

    from PIL import Image

    whole = BytesIO()
    figure.savefig(whole, dpi=110)
    Image.open(whole).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(output, optimize=True)


def table(rows: list[Row], dtype: str = "float32", ours: str = "fastclip", sizes: Iterable[int] = ()) -> str:
    """Return a Markdown table of fastclip and open_clip, with a line for each N of the rows and of `sizes`. A dash
    means not measured. fastclip's rows are those of `ours` or, as in rows of `fastclip bench`, of its backend on a CPU.
    """
    chosen = [row for row in rows if row["dtype"] == dtype]
    if not any(row["provider"] == ours for row in chosen):
        ours = "fastclip_cpu"
    by_size = {(int(row["N"]), row["provider"]): row for row in chosen}
    width = {int(row["N"]): row["D"] for row in chosen}
    several = len(set(width.values())) > 1

    def cell(N: int, provider: str, column: str, digits: int) -> str:
        row = by_size.get((N, provider))
        value = _number(row, column)
        return (row or {}).get("status") or "-" if value != value else f"{value:,.{digits}f}"

    lines = [
        "| N | fastclip, ms | times as fast as open_clip | % of the floor | peak MiB, fastclip / open_clip |",
        "|---:|---:|---:|---:|---:|",
    ]
    for N in sorted({*width, *sizes}):
        cells = [cell(N, ours, *which) for which in (("median_ms", 1), (SPEED, 2), (SHARE, 0))]
        peaks = " / ".join(cell(N, name, PEAK, 0) for name in (ours, "open_clip"))
        size = f"{N:,} x {int(width[N]):,}" if several and N in width else f"{N:,}"
        lines.append(f"| {size} | {' | '.join(cells)} | {peaks} |")
    return "\n".join(lines)


def gpu_table(rows: list[Row]) -> str:
    """Return a Markdown table with a line for each (N, D) and a column for each provider: ms, and for fastclip also per
    cent of the floor. A blank means not measured.
    """
    present = {row["provider"] for row in rows}
    providers = [name for name in STYLES if name in present]
    by_size = {(int(row["N"]), int(row["D"]), row["provider"]): row for row in rows}

    def cell(N: int, D: int, provider: str) -> str:
        row = by_size.get((N, D, provider))
        if not row or not row["median_ms"]:
            return ""
        has_share = provider.startswith("fastclip") and row["floor_percent"]  # rows of `fastclip bench` do not have it
        share = f" ({float(row['floor_percent']):.0f} %)" if has_share else ""
        return f"{float(row['median_ms']):,.2f}{share}"

    lines = [f"| N | D | {' | '.join(f'`{name}`, ms' for name in providers)} |", "|---:" * (len(providers) + 2) + "|"]
    for N, D in sorted({(N, D) for N, D, _ in by_size}):
        lines.append(f"| {N:,} | {D:,} | {' | '.join(cell(N, D, name) for name in providers)} |")
    return "\n".join(lines)
