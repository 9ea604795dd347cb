"""Draws the benchmark's figure, or prints the README's table, from its rows alone.

python -m benchmarks.plot
python -m benchmarks.plot --loss sigmoid --table
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
SPEED, PEAK = "speedup_over_open_clip", "peak_mib"
COLUMNS = ["loss", "mode", "N", "D", "dtype", "provider", "median_ms", "floor_percent", SPEED, PEAK]
VERSIONS = ["torch", "fastclip", "open_clip"]
CPU_COLUMNS = ["date", "machine", "threads", "isa", *VERSIONS]
GPU_COLUMNS = ["date", "gpu", "driver", "cuda", "triton", *VERSIONS]

# Colours that the colour-blind tell apart (Okabe and Ito, 2008); the floor is a bound, not a peer
STYLES: dict[str, dict[str, str]] = {
    "fastclip": {"color": "#D55E00", "marker": "o"},
    "fastclip_cuda": {"color": "#D55E00", "marker": "o"},
    "fastclip_triton": {"color": "#E69F00", "marker": "v"},
    "open_clip": {"color": "#0072B2", "marker": "s"},
    "open_clip_compiled": {"color": "#56B4E9", "marker": "^"},
    "linear_cross_entropy": {"color": "#009E73", "marker": "D"},
    "cut_cross_entropy": {"color": "#CC79A7", "marker": "P"},
    "inf_cl": {"color": "#F0E442", "marker": "X"},
    "memeff": {"color": "#000000", "marker": "*"},
    "siglip_kernel": {"color": "#CC79A7", "marker": "P"},
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
    """The rows of a loss in mode `both`; of several for the same case and provider the last in the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: `make bench` writes it")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        found = reader.fieldnames or []
        about = GPU_COLUMNS if "gpu" in found else CPU_COLUMNS
        if missing := [name for name in COLUMNS + about if name not in found]:
            raise ValueError(f"{path} has no columns {', '.join(missing)}: not rows of the benchmark")
        wanted = [row for row in reader if (row["loss"], row["mode"]) == (loss, "both")]
        last = {(row["N"], row["dtype"], row["provider"]): row for row in wanted}
    if not last:
        raise ValueError(f"{path} has no rows of the {loss} loss in mode both")
    return sorted(last.values(), key=lambda row: int(row["N"]))


def _number(row: Row | None, column: str) -> float:
    return float(row[column]) if row and row[column] else float("nan")


def _all(rows: list[Row], column: str) -> str:
    values = {row[column] for row in rows if row[column]}
    return " / ".join(sorted(values, key=lambda value: (len(value), value) if value.isdecimal() else (0, value)))


def _about(rows: list[Row]) -> str:
    versions = ", ".join(f"{name} {_all(rows, name)}" for name in VERSIONS)
    if "gpu" in rows[0]:
        machine = f"{_all(rows, 'gpu')}, driver {_all(rows, 'driver')}, CUDA {_all(rows, 'cuda')}"
        machine += f", triton {_all(rows, 'triton')}"
    else:
        machine = f"{_all(rows, 'machine')}, threads: {_all(rows, 'threads')}, {_all(rows, 'isa')}"
    return f"{machine}\n{versions}; {_all(rows, 'date')}"


def draw(rows: list[Row], output: Path) -> None:
    """Speed and peak memory against N, a row of panels for each dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    dtypes = sorted({row["dtype"] for row in rows}, key=lambda dtype: (dtype != "float32", dtype))
    sizes = sorted({int(row["N"]) for row in rows})
    present = {row["provider"] for row in rows}
    providers = [name for name in STYLES if name in present] + sorted(present - set(STYLES))
    found = {(row["N"], row["dtype"], row["provider"]): row for row in rows}

    figure, panels = plt.subplots(
        len(dtypes), 2, figsize=(10, 1.9 + 3 * len(dtypes)), sharex=True, squeeze=False, layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    for (speed, peak), dtype in zip(panels, dtypes):
        for name in providers:
            style = {"marker": "", "linestyle": "-", "linewidth": 1.8, "markersize": 5.5, **STYLES.get(name, {})}
            cells = [found.get((str(N), dtype, name)) for N in sizes]
            speed.plot(sizes, [_number(cell, SPEED) for cell in cells], label=LABELS.get(name, name), **style)
            if name != "floor":  # has no step of its own to measure
                peak.plot(sizes, [_number(cell, PEAK) for cell in cells], **style)
        speed.set_title(f"{dtype}: speed (higher is better)", fontsize=11)
        peak.set_title(f"{dtype}: peak memory (lower is better)", fontsize=11)
        speed.set_ylabel("times as fast as open_clip")
        speed.set_ylim(bottom=0)
        peak.set_ylabel("MiB beyond features and gradients")
        if any(_number(row, PEAK) > 0 for row in rows if row["dtype"] == dtype):  # a log axis wants something to show
            peak.set_yscale("log")
            peak.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        for panel in (speed, peak):
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_locator(FixedLocator(sizes))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            panel.xaxis.set_minor_locator(NullLocator())
            panel.grid(color="#dddddd", linewidth=0.7)
            panel.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    for panel in panels[-1]:
        panel.set_xlabel("batch size N")
    title = f"{TITLES[rows[0]['loss']]}, forward and backward, D = {_all(rows, 'D')}"
    figure.suptitle(f"{title}\n{_about(rows)}", fontsize=10.5, linespacing=1.4)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)
    plt.close(figure)


def table(rows: list[Row], dtype: str = "float32") -> str:
    """Markdown: fastclip beside open_clip, a line for each N. A dash is what has not been measured."""
    found = {(int(row["N"]), row["provider"]): row for row in rows if row["dtype"] == dtype}

    def cell(N: int, provider: str, column: str, digits: int) -> str:
        value = _number(found.get((N, provider)), column)
        return "-" if value != value else f"{value:,.{digits}f}"

    lines = [
        "| N | fastclip, ms | times as fast as open_clip | % of the floor | peak MiB, fastclip / open_clip |",
        "|---:|---:|---:|---:|---:|",
    ]
    for N in sorted({N for N, _ in found}):
        ours = [cell(N, "fastclip", *which) for which in (("median_ms", 1), (SPEED, 2), ("floor_percent", 0))]
        peaks = " / ".join(cell(N, name, PEAK, 0) for name in ("fastclip", "open_clip"))
        lines.append(f"| {N:,} | {' | '.join(ours)} | {peaks} |")
    return "\n".join(lines)


def gpu_table(rows: list[Row]) -> str:
    """Markdown: a line for each (N, D), a column for each provider: ms, and per cent of the floor of fastclip's. What
    has not been measured stays blank."""
    present = {row["provider"] for row in rows}
    providers = [name for name in STYLES if name in present]
    found = {(int(row["N"]), int(row["D"]), row["provider"]): row for row in rows}

    def cell(N: int, D: int, provider: str) -> str:
        row = found.get((N, D, provider))
        if not row or not row["median_ms"]:
            return ""
        share = f" ({float(row['floor_percent']):.0f} %)" if provider.startswith("fastclip") else ""
        return f"{float(row['median_ms']):,.2f}{share}"

    lines = [f"| N | D | {' | '.join(f'`{name}`, ms' for name in providers)} |", "|---:" * (len(providers) + 2) + "|"]
    for N, D in sorted({(N, D) for N, D, _ in found}):
        lines.append(f"| {N:,} | {D:,} | {' | '.join(cell(N, D, name) for name in providers)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=RESULTS / "cpu.csv", help="CSV of the benchmark")
    parser.add_argument("--loss", choices=TITLES, default="softmax")
    parser.add_argument("--output", type=Path, help="figure (default: beside the rows, named after rows and loss)")
    parser.add_argument("--table", action="store_true", help="print the table (a CPU's: float32) instead of drawing")
    arguments = parser.parse_args()
    try:
        rows = read(arguments.rows, arguments.loss)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    if arguments.table:
        print(gpu_table(rows) if "gpu" in rows[0] else table(rows))
        return
    output = arguments.output or arguments.rows.with_name(f"{arguments.rows.stem}_{arguments.loss}.png")
    draw(rows, output)
    print(output)


if __name__ == "__main__":
    main()
