"""Write benchmarks/REPORT.md and its figures from the rows alone, or one table or figure of these or other rows.

python -m benchmarks.report                                      everything
python -m benchmarks.report --table softmax --device cuda        one of the README's tables
python -m benchmarks.report --figure runs/rows.png --rows runs/rows.csv --loss sigmoid
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from benchmarks.plot import PEAK, RESULTS, SHARE, SPEED, TITLES, Row, draw, gpu_table, read, table
from fastclip.system.durable import write_text

REPORT = Path(__file__).parent / "REPORT.md"
DEVICES = {"cpu": ("On a CPU", "fastclip"), "cuda": ("On a GPU", "fastclip_cuda")}
# Columns that describe the machine of a row; every distinct combination is a run
MACHINE = ("gpu", "machine", "threads", "isa", "driver", "cuda")
VERSIONS = ("python", "torch", "triton", "fastclip", "open_clip", "webdataset", "numpy", "pillow", "inf_cl")

HEAD = """# Benchmark report

Generated from the rows in `benchmarks/results` by `make report`; do not edit. [README.md](README.md) describes what is
measured and how. A dash means not measured. The last column of a table is the number of the run: its machine, versions,
date and commit are listed [below](#runs). If a case has several rows, the last one counts. Comparisons are medians of
the rounds' ratios. The floor is the time of the matrix products that no provider can avoid.
"""


class Section(NamedTuple):
    """Section for one CSV: the columns that identify a case, and the columns to show with their headings."""

    title: str
    text: str
    case: tuple[str, ...]
    columns: dict[str, str]
    always: bool = True  # shown even without measurements


SECTIONS = {
    "training": Section(
        "Training steps",
        "A step of `fastclip train` and of open_clip's `train_one_epoch`, from the same weights and on the same batch, "
        "which is in memory.",
        ("model", "precision", "batch_size", "micro_batch", "texts", "keep_graphs", "provider", "threads"),
        {
            "model": "model",
            "precision": "precision",
            "batch_size": "batch",
            "micro_batch": "micro-batch",
            "texts": "texts",
            "provider": "provider",
            "median_s": "s",
            "speedup_over_open_clip": "times as fast as open_clip",
            "samples_per_second": "pairs/s",
            "loss_percent": "loss, % of the step",
            "peak_mib": "peak MiB",
            "rounds": "rounds",
            "load": "load",
        },
    ),
    "data": Section(
        "Reading data",
        "JPEGs in tar shards, read by two workers into batches of 64.",
        ("width", "height", "samples", "provider"),
        {
            "width": "width",
            "height": "height",
            "samples": "samples",
            "provider": "provider",
            "samples_per_second": "samples/s",
            "speedup_over_webdataset": "times as fast as webdataset",
            "cpu_ms_per_sample": "CPU ms per sample",
            "rounds": "rounds",
            "load": "load",
        },
    ),
    "checkpoints": Section(
        "Checkpoints",
        "Time that checkpoints add to a step of `fastclip train`, including the last write.",
        ("model", "batch_size", "save_every", "kind"),
        {
            "model": "model",
            "checkpoint_mib": "checkpoint, MiB",
            "save_every": "interval, steps",
            "kind": "written",
            "median_ms": "ms per step",
            "extra_ms_a_step": "extra ms per step",
            "rounds": "rounds",
            "load": "load",
        },
    ),
    "distributed": Section(
        "Several processes",
        "The sharded softmax loss on W processes that share the cores of one machine. The counts are exact; the times "
        "are not representative.",
        ("W", "local_N", "D", "dtype", "provider"),
        {
            "W": "W",
            "local_N": "pairs per process",
            "dtype": "dtype",
            "provider": "provider",
            "gradient": "gradient",
            "operations_8NND_W": "operations, 8 N² D / W",
            "received_bytes": "received bytes",
            "calls": "calls",
            "peak_mib": "peak MiB",
            "median_ms": "ms",
            "speedup_over_open_clip_local": "times as fast as open_clip_local",
            "status": "status",
            "load": "load",
        },
    ),
    "search": Section(
        "Search",
        "`fastclip search`: answering a query, reading an index, the whole command, and indexing JPEGs.",
        ("what", "pictures", "dim"),
        {
            "what": "operation",
            "pictures": "images",
            "dim": "D",
            "median_s": "s",
            "p20_s": "p20",
            "p80_s": "p80",
            "pictures_per_second": "images/s",
            "rounds": "rounds",
            "load": "load",
        },
    ),
    "recipes": Section(
        "Losses of others",
        "Losses beside the packages that have them, forward and backward, in fp32.",
        ("loss", "N", "D", "provider"),
        {
            "loss": "loss",
            "N": "N",
            "D": "D",
            "provider": "provider",
            "median_ms": "ms",
            "p20_ms": "p20",
            "p80_ms": "p80",
            "speedup_over_peer": "times as fast as the peer",
            "peak_mib": "peak MiB",
            "rounds": "rounds",
            "load": "load",
        },
    ),
    "gpu_ten": Section(
        "Ten minutes with a GPU",
        "`make gpu-ten`: errors, time of the host, counters, a profile, workspace sizes and variants.",
        ("part", "case", "provider", "measure", "unit"),
        {
            "part": "part",
            "case": "case",
            "provider": "provider",
            "measure": "measure",
            "value": "median",
            "unit": "unit",
            "p20": "p20",
            "p80": "p80",
            "status": "status",
        },
        always=False,
    ),
}
LOSS_COLUMNS = {
    "N": "N",
    "D": "D",
    "provider": "provider",
    "median_ms": "ms",
    "p20_ms": "p20",
    "p80_ms": "p80",
    SPEED: "times as fast as open_clip",
    SHARE: "% of the floor",
    PEAK: "peak MiB",
}


class Runs:
    """Numbers of the conditions under which rows were measured."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def of(self, row: Row) -> str:
        where = ", ".join(_named(name, row[name]) for name in MACHINE if row.get(name))
        what = ", ".join(f"{name} {row[name]}" for name in VERSIONS if row.get(name))
        source = f"{row['date']}, commit {row['commit']}: {where}; {what}"
        return str(self.numbers.setdefault(source, len(self.numbers) + 1))


def _named(name: str, value: str) -> str:
    return value if name in ("gpu", "machine", "isa") else f"{name} {value}"


def _cell(text: str) -> str:
    """Return a figure with about three digits, a name unchanged, or a dash for an empty cell."""
    try:
        value = float(text)
    except ValueError:
        return text or "-"
    if text.isdecimal() or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"


def rows_table(rows: Iterable[Row], columns: dict[str, str], runs: Runs) -> str:
    """Return a Markdown table with one line per row; empty columns are left out."""
    rows = list(rows)
    shown = {name: head for name, head in columns.items() if any(row.get(name) for row in rows)}
    right = {name for name in shown if all(_is_number(row[name]) for row in rows if row[name])}
    lines = [
        f"| {' | '.join(shown.values())} | run |",
        "|" + "".join("---:|" if name in right else "---|" for name in shown) + "---:|",
    ]
    lines += [f"| {' | '.join(_cell(row[name]) for name in shown)} | {runs.of(row)} |" for row in rows]
    return "\n".join(lines)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def last_rows(path: Path, case: tuple[str, ...]) -> list[Row]:
    """Return the last row of each case, in the order of the cases, or every row if `case` is empty."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return list({tuple(row[name] for name in case) or k: row for k, row in enumerate(rows)}.values())


def _losses(folder: Path, device: str, runs: Runs) -> list[str]:
    title, ours = DEVICES[device]
    out = [f"\n## {title}\n"]
    measured = {loss: _read(folder / f"{device}.csv", loss) for loss in TITLES}
    sizes = {int(row["N"]) for rows in measured.values() for row in rows}
    for loss, rows in measured.items():
        out.append(f"### {TITLES[loss]}\n")
        if not rows:
            out.append("Not measured.\n")
            continue
        out.append(f"![Speed, share of the floor and peak memory against N](results/{device}_{loss}.png)\n")
        for dtype in sorted({row["dtype"] for row in rows}, key=lambda dtype: (dtype != "float32", dtype)):
            chosen = [row for row in rows if row["dtype"] == dtype]
            every = rows_table(chosen, {**LOSS_COLUMNS, "status": "status"}, runs)
            out.append(f"{dtype}, `{ours}` compared with open_clip:\n\n{table(chosen, dtype, ours, sizes)}\n")
            out.append(f"<details><summary>{dtype}, all providers</summary>\n\n{every}\n\n</details>\n")
    return out


def _read(path: Path, loss: str) -> list[Row]:
    try:
        return read(path, loss)
    except (FileNotFoundError, ValueError):
        return []


def text(folder: Path = RESULTS) -> str:
    """Return the report of a folder of rows."""
    runs, out = Runs(), [HEAD]
    for device in DEVICES:
        out += _losses(folder, device, runs)
    others = {path.stem: path for path in sorted(folder.glob("*.csv")) if path.stem not in DEVICES}
    for name in [*SECTIONS, *(name for name in others if name not in SECTIONS)]:
        if name not in others:
            if SECTIONS[name].always:
                out.append(f"## {SECTIONS[name].title}\n\nNot measured.\n")
            continue
        section = SECTIONS.get(name) or _unknown(name, others[name])
        rows = last_rows(others[name], section.case)
        out.append(
            f"## {section.title}\n\n{section.text}\n\n{rows_table(rows, section.columns, runs)}\n".replace(
                "\n\n\n", "\n"
            )
        )
    out.append("## Runs\n")
    out += [f"{number}. {source}" for source, number in runs.numbers.items()]
    return "\n".join(out) + "\n"


def _unknown(name: str, path: Path) -> Section:
    """Return a section for rows that this report does not know, with all rows and columns."""
    with path.open(newline="") as file:
        columns = next(csv.reader(file))
    shown = {column: column for column in columns if column not in (*MACHINE, *VERSIONS, "date", "commit")}
    return Section(name.replace("_", " ").capitalize(), "", (), shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--table",
        choices=TITLES,
        help="loss whose table is printed, for a CPU in float32 (default: tables and figures are written)",
    )
    parser.add_argument(
        "--device", choices=DEVICES, default="cpu", help="device whose rows are shown (default: %(default)s)"
    )
    parser.add_argument(
        "--figure", type=Path, help="file to draw, in place of all tables and figures (default: all are written)"
    )
    parser.add_argument(
        "--loss", choices=TITLES, default="softmax", help="loss that --figure draws (default: %(default)s)"
    )
    parser.add_argument(
        "--rows", type=Path, help="CSV file to read for --table and --figure (default: benchmarks/results/DEVICE.csv)"
    )
    arguments = parser.parse_args()
    path = arguments.rows or RESULTS / f"{arguments.device}.csv"
    try:
        if arguments.table:
            rows = read(path, arguments.table)
            print(gpu_table(rows) if "gpu" in rows[0] else table(rows))
        elif arguments.figure:
            draw(read(path, arguments.loss), arguments.figure)
        else:
            for device in DEVICES:
                for loss in TITLES:
                    if rows := _read(RESULTS / f"{device}.csv", loss):
                        draw(rows, RESULTS / f"{device}_{loss}.png")
            write_text(REPORT, text())
            print(REPORT)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
