"""``fastclip bench``: time the losses on this machine."""

from __future__ import annotations

import argparse

from fastclip.cli.embedding import DEVICE
from fastclip.cli.help import describe
from fastclip.cli.outputs import add_force, owned_files

__all__ = ["add"]


def add(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Time a step of the loss, forward and backward, on every backend that runs here. The same step is timed with "
        "the unfused formula, which stores the whole matrix of similarities, and with open_clip's loss if it is "
        "installed. Before timing, the values and gradients of each are compared with reference values in float64. "
        "Every round runs each backend and formula once, and the table shows the medians of the rounds. On a GPU, peak "
        "memory is measured as well.",
        "fastclip bench",
        "fastclip bench --loss sigmoid --sizes 1024,4096",
        "fastclip bench --device cuda --dtype bfloat16 --output rows.csv",
    )
    parser.add_argument(
        "--loss",
        choices=("softmax", "sigmoid"),
        default="softmax",
        help="loss to time; fastclip train calls them clip (softmax) and siglip (sigmoid)",
    )
    parser.add_argument(
        "--sizes",
        metavar="N,N,...",
        help="pairs per batch, several sizes separated by commas (default: 1024,2048,4096 on a CPU, 8192,32768,65536 "
        "on a GPU)",
    )
    parser.add_argument(
        "--D", type=int, default=512, dest="dim", metavar="N", help="width of the features (--dim of fastclip parity)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="data type of the features (default: bfloat16 on a GPU, float32 on a CPU)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help=f"{DEVICE} (default: a GPU if there is one, otherwise the CPU)"
    )
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="timed rounds, of which the median is taken")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="CSV file to which rows are added, with columns for the case, times, memory and this machine (default: no "
        "file)",
    )
    add_force(parser)
    parser.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> None:
    from fastclip.bench import columns, measure, table
    from fastclip.bench.harness import append, check_columns

    with owned_files(args, "output"):
        if args.output is not None:
            check_columns(args.output, columns(args.device))  # before the first size is timed, which may take minutes
        options = {name: getattr(args, name) for name in ("loss", "dim", "dtype", "device", "rounds")}
        for k, measured in enumerate(measure(sizes=_sizes(args.sizes), **options)):
            if k == 0:
                about = ", ".join(f"{name} {value}" for name, value in measured.about.items() if value)
                print(f"{args.loss} loss, {measured.case.dtype}, D = {measured.case.D}; {about}\n")
            print(table(measured, head=k == 0), flush=True)
            if args.output is not None:
                append(args.output, measured.rows, measured.about)


def _sizes(text: str | None) -> list[int] | None:
    if text is None:
        return None
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise ValueError(f"--sizes must be numbers of pairs separated by commas, such as 1024,4096, got {text}")
    return [int(word) for word in words]
