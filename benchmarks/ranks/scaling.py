"""Draw and print the model of the loss on many GPUs; the model itself is `scaling_model.py`.

python -m benchmarks.ranks.scaling            draws docs/scaling.png
python -m benchmarks.ranks.scaling --tables   prints the tables of docs/scaling.md
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

from benchmarks.ranks.scaling_model import FORMS, WORKSPACE, Time, gathered, memory, time

FIGURE = Path(__file__).parents[2] / "docs" / "scaling.png"
ROWS = Path(__file__).parents[1] / "results" / "distributed.csv"
BATCHES = tuple(2**k for k in (15, 17, 19, 20, 21, 22))
RANKS = (8, 64, 256, 1024)
SMALL = 1024  # pairs per rank, below which the products no longer determine the time
# s of a step that only waits for the host, which `scaling_model` leaves out: measured for 8,192 pairs, D = 512, on one
# H200 (the last such row of results/cuda.csv)
HOST = 2.5e-3
GPU_BYTES = 141e9
# Operations per sample in the forward pass, from open_clip's docs/model_profile.csv. The backward pass costs twice as
# much
MODELS = {"ViT-L/14": (175.33e9, 768), "ViT-B/32": (14.78e9, 512)}
ENCODERS = 400e12  # operations/s, assumed: 40 % of the specified 989e12

# The gradient column of results/distributed.csv, in words
GRADIENTS = {
    "1/W of the encoders'": "encoders: too small by a factor of W",
    "W times the scale's": "scale: too large by a factor of W",
}
COLORS = {"fastclip_gather": "#D55E00", "fastclip_ring": "#E69F00", "open_clip_local": "#0072B2"}
LABELS = {"open_clip_local": "open_clip (exact flags)"}
PARTS = {
    "products": ("products", "#777777"),
    "memory": ("memory traffic", "#CC79A7"),
    "launches": ("launches", "#F0E442"),
    "gather": ("gather", "#56B4E9"),
    "reduce_scatter": ("reduce-scatter", "#0072B2"),
    "messages": ("messages not hidden", "#009E73"),
    "columns": ("log-sum-exps", "#000000"),
}


def batch(N: int) -> str:
    return f"{N >> 20}M" if N >= 2**20 else f"{N >> 10}k"


def _table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---:"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}"


def time_table(D: int) -> str:
    """Return a table of ms of gather / ring / open_clip. A dash means more memory than the GPU has, a star small
    shards, a dagger a time that the host would determine.
    """

    def cell(W: int, N: int) -> str:
        times = {form: time(form, W, N, D) for form in FORMS}
        ms = [_number(1e3 * t.total) if memory(form, W, N, D) < GPU_BYTES else "-" for form, t in times.items()]
        gather = times["fastclip_gather"]
        waits = "\u2020" if gather.products + gather.memory < HOST else ""
        return " / ".join(ms) + ("\\*" if N // W < SMALL else waits)

    return _table(["N", *(f"W = {W:,}" for W in RANKS)], [[batch(N), *(cell(W, N) for W in RANKS)] for N in BATCHES])


def parts_table(N: int, D: int) -> str:
    lines = []
    for form in FORMS:
        for W in RANKS[1:]:
            t = time(form, W, N, D)
            cells = [t.products, t.memory, t.launches, t.gather, t.reduce_scatter, t.messages, t.columns, t.total]
            lines.append([f"`{form}`", f"{W:,}", *(_number(1e3 * x) for x in cells)])
    names = [name for name, _ in PARTS.values()]
    return _table(["form", "W", *names, "total"], lines)


def memory_table() -> str:
    """Return a table of GiB per rank."""
    columns = [("fastclip_gather", 64, D) for D in (512, 768, 1024)]
    columns += [("fastclip_ring", W, 768) for W in (64, 256)] + [("open_clip_local", W, 768) for W in (64, 256, 1024)]
    head = [f"`{form}`, W = {W:,}, D = {D:,}" for form, W, D in columns]
    lines = [[batch(N), *(_number(memory(form, W, N, D) / 2**30) for form, W, D in columns)] for N in BATCHES]
    return _table(["N", *head], lines)


def ratio_table(D: int) -> str:
    """Return a table of the ring's time divided by the gather's, by pairs per rank."""
    ranks = (8, 16, 64, 256, 1024)

    def cell(W: int, n: int) -> str:
        ring, gather = (time(form, W, n * W, D).total for form in ("fastclip_ring", "fastclip_gather"))
        return f"{ring / gather:.2f}" if n * W <= BATCHES[-1] else ""

    sizes = (1024, 2048, 4096, 8192, 16384, 65536)
    lines = [[f"{n:,}", *(cell(W, n) for W in ranks)] for n in sizes]
    return _table(["pairs per rank", *(f"W = {W:,}" for W in ranks)], lines)


def limit_table() -> str:
    """Return a table of the largest N whose gather stays within a budget, including the workspace."""
    budgets, widths = (4, 8, 16, 32), (512, 768, 1024)

    def cell(budget: int, D: int) -> str:
        return f"{(budget * 2**30 - WORKSPACE) / gathered(1, D) / 2**20:.2f}M"

    lines = [[f"{budget} GiB", *(cell(budget, D) for D in widths)] for budget in budgets]
    return _table(["budget per rank", *(f"D = {D:,}" for D in widths)], lines)


def share(model: str, form: str, W: int, N: int) -> float:
    """Return the loss's share of a training step that consists of encoders (forward and backward) and loss."""
    operations, D = MODELS[model]
    loss = time(form, W, N, D).total
    return loss / (loss + N / W * 3 * operations / ENCODERS)


def share_table() -> str:
    """Return a table of these shares in per cent, for gather / open_clip."""

    def cell(model: str, W: int, N: int) -> str:
        D = MODELS[model][1]
        forms = ("fastclip_gather", "open_clip_local")
        shares = (f"{100 * share(model, form, W, N):.1f}" for form in forms)
        return " / ".join(x if memory(form, W, N, D) < GPU_BYTES else "-" for form, x in zip(forms, shares))

    ranks = (64, 256, 1024)
    head = ["N", *(f"{model}, W = {W:,}" for model in MODELS for W in ranks)]
    return _table(head, [[batch(N), *(cell(model, W, N) for model in MODELS for W in ranks)] for N in BATCHES])


def gloo_table(path: Path = ROWS, W: int = 4) -> str:
    """Return a table of what was counted and timed on the processes of one machine. The last row of a case counts."""
    with path.open(newline="") as file:
        last = {(row["provider"], row["dtype"]): row for row in csv.DictReader(file) if row["W"] == str(W)}
    lines = []
    for name in dict.fromkeys(name for name, _ in last):
        row, narrow = last[name, "float32"], last[name, "bfloat16"]
        sent = [f"{int(x[f'{way}_bytes']) / 2**20:.1f}" for x in (row, narrow) for way in ("forward", "backward")]
        units = f"{float(row['operations_8NND_W']):.2f}"
        keys = {"peak_mib": 0, "median_ms": 0, "speedup_over_open_clip_local": 2}
        measured = [f"{float(row[key]):,.{digits}f}" if row[key] else "-" for key, digits in keys.items()]
        lines.append([f"`{name}`", GRADIENTS.get(row["gradient"], row["gradient"]), *sent, units, *measured])
    head = ["", "gradient", "MiB sent, fp32: forward", "fp32: backward", "bf16: forward", "bf16: backward"]
    return _table([*head, "products, 8 N^2 D / W", "peak MiB", "ms", "speed relative to `open_clip_local`"], lines)


def tables() -> dict[str, str]:
    return {
        "time": time_table(768),
        "parts": parts_table(2**20, 768),
        "memory": memory_table(),
        "ratio": ratio_table(768),
        "limit": limit_table(),
        "share": share_table(),
        "gloo": gloo_table(),
    }


def _draw_time(axes: Any, N: int, D: int) -> None:
    ranks = [2**k for k in range(3, 11)]
    for form in FORMS:
        ms = [1e3 * time(form, W, N, D).total for W in ranks]
        axes.plot(ranks, ms, "o-", color=COLORS[form], label=LABELS.get(form, form), markersize=4)
    alone = [1e3 * time(FORMS[0], W, N, D).products for W in ranks]
    axes.plot(ranks, alone, "--", color="#777777", label="fastclip's products alone")
    axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="ms", title=f"time of the loss, N = {batch(N)}, D = {D}")
    axes.set_xticks(ranks, [str(W) for W in ranks])
    axes.legend(frameon=False, fontsize=8, loc="upper right")


def _draw_parts(axes: Any, N: int, D: int) -> None:
    bars = [(form, W) for W in RANKS[1:] for form in FORMS[:2]]
    times: list[Time] = [time(form, W, N, D) for form, W in bars]
    bottom = [0.0] * len(bars)
    for part, (label, color) in PARTS.items():
        heights = [1e3 * getattr(t, part) for t in times]
        axes.bar(range(len(bars)), heights, bottom=bottom, color=color, label=label)
        bottom = [a + b for a, b in zip(bottom, heights)]
    axes.set_xticks(range(len(bars)), [f"{form.removeprefix('fastclip_')}\n{W}" for form, W in bars])
    axes.set(ylabel="ms", title=f"parts of the time, N = {batch(N)}, D = {D}")
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)


def _draw_memory(axes: Any, W: int, D: int) -> None:
    sizes = [2**k for k in range(15, 23)]
    for form in FORMS:
        gib = [memory(form, W, N, D) / 2**30 for N in sizes]
        axes.plot(sizes, gib, "o-", color=COLORS[form], markersize=4)
    axes.axhline(GPU_BYTES / 2**30, color="#777777", linestyle="--")
    axes.annotate("an H200", (sizes[0], GPU_BYTES / 2**30 * 0.7), color="#777777", fontsize=9, va="top")
    axes.set(xscale="log", yscale="log", xlabel="batch N", ylabel="GiB a rank", title=f"memory, W = {W}, D = {D}")
    axes.set_xticks(sizes[::2], [batch(N) for N in sizes[::2]])


def draw(output: Path, N: int = 2**20, D: int = 768, W: int = 256) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (times, parts, memories) = plt.subplots(1, 3, figsize=(13, 4.6), layout="constrained")
    _draw_time(times, N, D)
    _draw_parts(parts, N, D)
    _draw_memory(memories, W, D)
    for axes in (times, parts, memories):
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.grid(axis="y", color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("A model: rates of one H200 and link speeds; nothing was measured on several GPUs", fontsize=11)
    figure.savefig(output, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FIGURE, help="file of the figure (default: %(default)s)")
    parser.add_argument("--tables", action="store_true", help="print the tables instead of drawing")
    arguments = parser.parse_args()
    if arguments.tables:
        print("\n\n".join(tables().values()))
        return
    draw(arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
