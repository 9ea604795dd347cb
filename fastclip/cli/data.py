"""``fastclip data``: check a dataset, or pack it into tar shards."""

from __future__ import annotations

import argparse

from fastclip.cli.help import add_training_option, describe
from fastclip.cli.outputs import add_force, add_samples_per_shard, owned_output
from fastclip.cli.pictures import DATA, MAX_SAMPLES, add_max_pixels, add_workers
from fastclip.cli.printing import complain, say
from fastclip.system.plural import counted

__all__ = ["add"]


def add(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Check the data that `fastclip train --data SPEC` would read, or pack it into tar shards.",
        "fastclip data check 'shards/{0000..0099}.tar' --model ViT-B-32",
        "fastclip data pack pairs.csv --output shards --size 256",
    )
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_check(commands.add_parser("check", help="read everything once, and report counts and faults"))
    _add_pack(commands.add_parser("pack", help="write tar shards in the layout of img2dataset"))


def _add_check(check: argparse.ArgumentParser) -> None:
    describe(
        check,
        "Read a dataset once, and report the number of samples, their faults by cause, the sizes of the images and the "
        "samples read per second. The exit status is 1 if a shard is damaged or too many samples cannot be used.",
        "fastclip data check pairs.csv",
        "fastclip data check 'shards/{0000..0099}.tar' --model ViT-B-32 --max-samples 100000",
    )
    check.add_argument("--max-samples", type=int, metavar="N", help=f"{MAX_SAMPLES} (default: all samples are read)")
    add_training_option(check, "model", default_words="images are decoded, but not prepared for a model")
    check.add_argument(
        "--max-bad",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="largest share of unusable samples that is tolerated, from 0 to 1; above it the exit status is 1",
    )
    _add_reading(check)
    check.set_defaults(run=_check_data)


def _add_pack(pack: argparse.ArgumentParser) -> None:
    describe(
        pack,
        "Write a dataset as tar shards in the layout of img2dataset. Re-run the same "
        "command to resume; the output is byte-identical to that of an uninterrupted run.",
        "fastclip data pack pairs.csv --output shards",
        "fastclip data pack photos --output shards --size 256 --workers 8",
    )
    pack.add_argument("--output", required=True, metavar="DIR", help="output folder for the shards")
    add_force(pack)
    add_samples_per_shard(pack)
    pack.add_argument(
        "--size",
        "--image-size",  # the former name, which scripts may use
        dest="image_size",
        type=int,
        metavar="N",
        help="length in pixels to which the shorter side of an image is reduced if it is longer (default: no image is "
        "resized)",
    )
    pack.add_argument("--quality", type=int, default=95, metavar="N", help="JPEG quality of resized images")
    _add_reading(pack)
    pack.set_defaults(run=_pack_data)


def _add_reading(parser: argparse.ArgumentParser) -> None:
    add_max_pixels(parser)
    add_workers(parser)
    parser.add_argument("spec", metavar="SPEC", help=DATA)


def _check_data(args: argparse.Namespace) -> int:
    from fastclip.data.check import check_source
    from fastclip.data.faults import shown
    from fastclip.data.spec import open_source

    if not 0 <= args.max_bad <= 1:
        raise ValueError(f"--max-bad must be between 0 and 1, got {args.max_bad}")
    transform = None
    if args.model is not None:
        from fastclip.models.config import load_config
        from fastclip.models.transforms import pixel_transform

        transform = pixel_transform(load_config(args.model), train=True)
    problems: list[str] = []
    source = open_source(args.spec, problems=problems)
    passed = getattr(source, "passed", None)
    report = check_source(source, workers=args.workers, max_samples=args.max_samples, transform=transform)
    sizes = zip(("smallest", "median", "largest"), report.pixels)
    whole = f" of {len(source):,}" if report.samples < len(source) else ""
    captions = counted(report.captions, "caption")
    lines = [
        ("samples", f"{report.samples:,}{whole}"),
        ("usable", f"{report.usable:,} ({report.usable / report.samples:.2%}), with {captions}"),
    ]
    for cause, count in report.faults:
        lines.append((f"- {cause}", f"{count:,}, first {', '.join(map(shown, report.faults.keys[cause]))}"))
    if passed:
        lines.append(("ignored", str(passed)))
    lines.append(("pixels", ", ".join(f"{name} {width} x {height}" for name, (width, height) in sizes)))
    workers = counted(args.workers, "worker")
    speed = f"{report.samples / report.seconds:,.0f} samples/s, {workers}, {report.seconds:.1f} s"
    lines += [("speed", speed), *(("damaged", problem) for problem in problems)]
    width = max(18, 2 + max(len(name) for name, _ in lines))
    say("\n".join(f"{name:<{width}}{text}" for name, text in lines))
    if problems:
        bad = counted(len(problems), "shard or dataset", "shards or datasets")
        complain(f"fastclip data: {bad} cannot be read completely")
        return 1
    if report.bad_share > args.max_bad:
        complain(
            f"fastclip data: {report.bad_share:.2%} of the samples cannot be used, more than --max-bad {args.max_bad:g}"
        )
        return 1
    return 0


def _pack_data(args: argparse.Namespace) -> None:
    from pathlib import Path

    from fastclip.data.pack import pack_source
    from fastclip.data.spec import open_source

    options = {name: getattr(args, name) for name in ("samples_per_shard", "image_size", "quality", "workers")}
    with owned_output(args):
        packed = pack_source(open_source(args.spec), Path(args.output), **options)
    kept = f", {packed.kept} of which already existed" if packed.kept else ""
    say(f"wrote {args.output}: {counted(packed.samples, 'sample')} in {counted(packed.shards, 'shard')}{kept}")
    if packed.faults.total:
        say(f"skipped: {packed.faults}")
