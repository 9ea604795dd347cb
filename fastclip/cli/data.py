"""``fastclip data``: check a data set, or pack it."""

from __future__ import annotations

import argparse

from fastclip.cli.outputs import add_force, owned_output
from fastclip.cli.pictures import add_max_pixels
from fastclip.cli.printing import complain, say

__all__ = ["add"]


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = "Check or pack the data that `fastclip train --data SPEC` would read."
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = commands.add_parser("check", help="read everything once: counts, faults by cause, samples a second")
    check.add_argument(
        "--max-samples", type=int, metavar="N", help="read at most N samples, evenly spread over the data"
    )
    check.add_argument("--model", help="prepare the pictures for this model, as training does")
    check.add_argument(
        "--max-bad", type=float, default=0.01, help="exit status 1 if a larger share of samples cannot be used (0.01)"
    )
    check.set_defaults(run=_check_data)
    pack = commands.add_parser(
        "pack", help="write tar shards in img2dataset's layout; re-run the same command to resume"
    )
    pack.add_argument("--output", required=True, metavar="DIR", help="output directory for the shards")
    add_force(pack)
    pack.add_argument(
        "--samples-per-shard", type=int, default=10_000, metavar="N", help="samples in each shard (10000)"
    )
    pack.add_argument("--image-size", type=int, metavar="N", help="resize pictures whose shorter side is longer")
    pack.add_argument("--quality", type=int, default=95, help="JPEG quality of resized pictures (95)")
    pack.set_defaults(run=_pack_data)
    for action in (check, pack):
        add_max_pixels(action)
        action.add_argument("spec", metavar="SPEC", help="data, as for fastclip train --data")
        action.add_argument("--workers", type=int, default=2, metavar="N", help="number of processes that read (2)")


def _check_data(args: argparse.Namespace) -> int:
    from fastclip.data.check import check_source
    from fastclip.data.faults import shown
    from fastclip.data.spec import open_source

    if not 0 <= args.max_bad <= 1:
        raise ValueError(f"--max-bad must be between 0 and 1, got {args.max_bad}")
    transform = None
    if args.model is not None:
        from fastclip.models.config import load_config
        from fastclip.models.transforms import image_transform

        transform = image_transform(load_config(args.model), train=True)
    problems: list[str] = []
    source = open_source(args.spec, problems=problems)
    passed = getattr(source, "passed", None)
    report = check_source(source, workers=args.workers, max_samples=args.max_samples, transform=transform)
    sizes = zip(("smallest", "median", "largest"), report.pixels)
    whole = f" of {len(source):,}" if report.samples < len(source) else ""
    lines = [
        ("samples", f"{report.samples:,}{whole}"),
        ("usable", f"{report.usable:,} ({report.usable / report.samples:.2%}), with {report.captions:,} captions"),
    ]
    for cause, count in report.faults:
        lines.append((f"- {cause}", f"{count:,}, first {', '.join(map(shown, report.faults.keys[cause]))}"))
    if passed:
        lines.append(("passed over", str(passed)))
    lines.append(("pixels", ", ".join(f"{name} {width} x {height}" for name, (width, height) in sizes)))
    speed = f"{report.samples / report.seconds:,.0f} samples/s, {args.workers} workers, {report.seconds:.1f} s"
    lines += [("speed", speed), *(("damaged", problem) for problem in problems)]
    width = max(18, 2 + max(len(name) for name, _ in lines))
    say("\n".join(f"{name:<{width}}{text}" for name, text in lines))
    if problems:
        complain(f"fastclip data: {len(problems)} shards or parts are damaged or cannot be read")
        return 1
    if report.bad_share > args.max_bad:
        complain(f"fastclip data: {report.bad_share:.2%} cannot be used, more than --max-bad {args.max_bad:g}")
        return 1
    return 0


def _pack_data(args: argparse.Namespace) -> None:
    from pathlib import Path

    from fastclip.data.pack import pack_source
    from fastclip.data.spec import open_source

    options = {name: getattr(args, name) for name in ("samples_per_shard", "image_size", "quality", "workers")}
    with owned_output(args):
        packed = pack_source(open_source(args.spec), Path(args.output), **options)
    kept = f", {packed.kept} of which were there" if packed.kept else ""
    say(f"wrote {args.output}: {packed.samples:,} samples in {packed.shards:,} shards{kept}")
    if packed.faults.total:
        say(f"left out: {packed.faults}")
