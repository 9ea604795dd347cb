"""``fastclip bench``"""

from __future__ import annotations

import argparse

from fastclip.cli.outputs import add_force, owned_files

__all__ = ["add"]


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Time a step of the loss, forward and backward, on every backend that runs here, beside open_clip's loss where "
        "it is installed and the dense formula. Values and gradients are checked first; rounds run everyone in turn; "
        "times are medians. Peak memory is measured on a GPU."
    )
    parser.add_argument("--loss", choices=("softmax", "sigmoid"), default="softmax", help="(softmax)")
    parser.add_argument("--sizes", metavar="N,N,...", help="pairs of a batch (1024,2048,4096; GPU: 8192,32768,65536)")
    parser.add_argument("--D", type=int, default=512, dest="dim", metavar="D", help="width of the features (512)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(float32; GPU: bfloat16)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="(7)")
    parser.add_argument("--output", metavar="FILE", help="add rows to a CSV, columns as benchmarks/README.md says")
    add_force(parser)
    parser.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> None:
    from fastclip.bench import columns, measure, table
    from fastclip.bench.harness import append, check_columns

    with owned_files(args, "output"):
        if args.output is not None:
            check_columns(args.output, columns(args.device))  # and not after the first size
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
        raise ValueError(f"--sizes {text}: numbers of pairs separated by commas, as in 1024,4096")
    return [int(word) for word in words]
