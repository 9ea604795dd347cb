"""The ``fastclip`` command. Each subcommand imports what it needs when it runs."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from fastclip._version import __version__

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status: 1 for what the user can mend, said on stderr, and what fails."""
    parser = _parser()
    args, words = parser.parse_known_args(argv)
    args.words = words  # of a command with a parser of its own
    if words and args.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(words)}")
    logging.basicConfig(level=logging.WARNING, format="fastclip: %(message)s")
    try:
        return args.run(args) or 0
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"fastclip {args.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastclip", description="Contrastive image-text models.")
    parser.add_argument("--version", action="version", version=f"fastclip {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_convert(commands.add_parser("convert", help="write a checkpoint in open_clip's, Hugging Face's or our form"))
    _add_parity(commands.add_parser("parity", help="compare the losses of several processes with those of one"))
    _add_data(commands.add_parser("data", help="check a data set, or pack one into tar shards"))
    train = commands.add_parser("train", help="train an image-text model", add_help=False)  # has a parser of its own
    train.set_defaults(run=_train)
    _add_plan(commands.add_parser("plan", help="predict the memory of a training step, and the largest micro-batch"))
    models = commands.add_parser("models", help="list the models by name")
    models.set_defaults(run=_models)
    return parser


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.description = "Read a checkpoint of any known form and write another. Weights are not changed."
    parser.add_argument("source", help="checkpoint: a file or a folder")
    parser.add_argument("target", help="folder, or for open_clip a file ending in .pt or .safetensors")
    parser.add_argument("--to", required=True, choices=("open_clip", "huggingface", "fastclip"), help="the form")
    parser.add_argument("--model", help="name of the model, where the source does not hold its configuration")
    parser.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> None:
    from fastclip.models.convert import convert
    from fastclip.models.factory import create_model

    model = create_model(args.model, args.source)
    convert(model, args.target, form=args.to)
    print(f"wrote {args.target}: {sum(p.numel() for p in model.parameters()):,} parameters in the form of {args.to}")


def _add_parity(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare loss and gradients of every form of the sharded losses, on every backend and dtype that runs here, "
        "with one float64 process, and print errors beside what is promised. Starts its processes itself, or is one of "
        "torchrun's: torchrun --nproc-per-node 4 --no-python fastclip parity. Exit status 1 when a promise is broken."
    )
    parser.add_argument("--nproc", type=int, help="processes (2); under torchrun as many as it started")
    parser.add_argument("--batch", type=int, default=64, help="images of a process (64)")
    parser.add_argument("--dim", type=int, default=64, help="width of the features (64)")
    parser.add_argument("--seed", type=int, default=0, help="of the features (0)")
    parser.add_argument("--backend", help="one backend in place of all that run here")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="gloo or NCCL; GPUs where there is one for each process"
    )
    parser.set_defaults(run=_parity)


def _parity(args: argparse.Namespace) -> int:
    from fastclip import parity

    options = {name: getattr(args, name) for name in ("nproc", "batch", "dim", "seed", "backend", "device")}
    about, rows = parity.run(**options)
    if not rows:  # rank 0 prints
        return 0
    failed = sum(not row.ok for row in rows)
    print(f"{about}: relative error / promised\n\n{parity.table(rows)}\n\n{len(rows)} comparisons, {failed} failed")
    return int(failed > 0)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.description = "What `fastclip train --data SPEC` would read."
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = commands.add_parser("check", help="read everything once: counts, faults by cause, samples a second")
    check.add_argument("--max-samples", type=int, metavar="N", help="at most so many, evenly spread over the data")
    check.add_argument("--model", help="prepare the pictures for this model, as training does")
    check.add_argument(
        "--max-bad", type=float, default=0.01, help="exit status 1 if a larger share of samples cannot be used (0.01)"
    )
    check.set_defaults(run=_check_data)
    pack = commands.add_parser("pack", help="write tar shards in img2dataset's layout; the same call again goes on")
    pack.add_argument("--output", required=True, metavar="DIR", help="folder of the shards")
    pack.add_argument("--samples-per-shard", type=int, default=10_000, metavar="N", help="(10000)")
    pack.add_argument("--image-size", type=int, metavar="N", help="resize pictures whose shorter side is longer")
    pack.add_argument("--quality", type=int, default=95, help="of the JPEGs that resizing makes (95)")
    pack.set_defaults(run=_pack_data)
    for action in (check, pack):
        action.add_argument("spec", metavar="SPEC", help="as of fastclip train --data")
        action.add_argument("--workers", type=int, default=2, metavar="N", help="processes that read (2)")


def _check_data(args: argparse.Namespace) -> int:
    from fastclip.data.check import check_source
    from fastclip.data.spec import open_source

    transform = None
    if args.model is not None:
        from fastclip.models.config import load_config
        from fastclip.models.transforms import image_transform

        transform = image_transform(load_config(args.model), train=True)
    source = open_source(args.spec)
    found = check_source(source, workers=args.workers, max_samples=args.max_samples, transform=transform)
    rows = {
        "samples": f"{found.samples:,} of {len(source):,}" if found.samples < len(source) else f"{found.samples:,}",
        "usable": f"{found.usable:,} ({found.usable / found.samples:.2%}), with {found.captions:,} captions",
        **{f"- {cause}": f"{n:,}, first {', '.join(found.faults.keys[cause])}" for cause, n in found.faults},
        "pixels": ", ".join(
            f"{name} {width} x {height}"
            for name, (width, height) in zip(("smallest", "median", "largest"), found.pixels)
        ),
        "speed": f"{found.samples / found.seconds:,.0f} samples/s, {args.workers} workers, {found.seconds:.1f} s",
    }
    print("\n".join(f"{name:<18}{text}" for name, text in rows.items()))
    if found.bad_share > args.max_bad:
        print(
            f"fastclip data: {found.bad_share:.2%} cannot be used, more than --max-bad {args.max_bad:g}",
            file=sys.stderr,
        )
        return 1
    return 0


def _pack_data(args: argparse.Namespace) -> None:
    from pathlib import Path

    from fastclip.data.pack import pack_source
    from fastclip.data.spec import open_source

    options = {name: getattr(args, name) for name in ("samples_per_shard", "image_size", "quality", "workers")}
    packed = pack_source(open_source(args.spec), Path(args.output), **options)
    kept = f", {packed.kept} of which were there" if packed.kept else ""
    print(f"wrote {args.output}: {packed.samples:,} samples in {packed.shards:,} shards{kept}")
    if packed.faults.total:
        print(f"left out: {packed.faults}")


def _train(args: argparse.Namespace) -> None:
    from fastclip._env import launched
    from fastclip.training.options import parse_options

    options = parse_options(args.words)
    from fastclip.training.trainer import train

    process = launched()
    first = process is None or process.rank == 0
    logging.getLogger("fastclip").setLevel(logging.INFO if first else logging.ERROR)
    run = train(options)
    if first:
        print(f"{run.folder}: {run.steps} steps, of which {len(run.losses)} in {run.seconds:.1f} s, by {run.backend!r}")
        found = {"loss": run.losses[-1], **run.validation} if run.losses else {}
        print("  ".join(f"{name} {value:.4g}" for name, value in found.items()))


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Predict the memory that each process of a training run needs, and of how many pairs it can hold the "
        "activations at a time: the run's --micro-batch. Nothing is computed or allocated. Exit status 1 when it does "
        "not fit."
    )
    parser.add_argument("--model", required=True, help="a name of fastclip models, or a configuration ending in .json")
    parser.add_argument("--batch-size", type=int, required=True, help="pairs of all processes")
    parser.add_argument("--world-size", type=int, default=1, help="processes, each with a device (1)")
    parser.add_argument("--memory", type=float, help="GiB a process has; default: this GPU's, or the machine's")
    parser.add_argument(
        "--micro-batch", type=int, help="pairs at a time; default: an even part of the largest that fits"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast (fp32)")
    parser.add_argument("--grad-checkpointing", action="store_true", help="keep the blocks' inputs only")
    parser.add_argument("--optimizer", choices=("adamw", "lamb"), default="adamw", help="(adamw)")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="whole models, or shards (ddp)")
    parser.add_argument("--comm", choices=("gather", "ring"), default="gather", help="of the loss (gather)")
    parser.add_argument("--ema", action="store_true", help="with a moving average of the weights")
    parser.add_argument("--lock-image", action="store_true", help="the image tower is frozen")
    parser.add_argument("--lock-text", action="store_true", help="the text tower is frozen")
    parser.add_argument("--image-size", type=int, help="pixels, in place of the model's")
    parser.add_argument("--context-length", type=int, help="tokens, in place of the model's")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where the run will be (cuda)")
    parser.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from fastclip.models.factory import create_model
    from fastclip.training import plan
    from fastclip.training.plan_report import machine_memory, remedies, table, told

    if args.memory is not None and not args.memory > 0:
        raise ValueError(f"--memory must be above 0 GiB, got {args.memory}")
    memory = machine_memory(args.device) if args.memory is None else int(args.memory * 2**30)
    model = create_model(args.model, device="meta", image_size=args.image_size, context_length=args.context_length)
    model.set_grad_checkpointing(args.grad_checkpointing)
    if args.lock_image:
        model.lock_image_tower()
    if args.lock_text:
        model.lock_text_tower()
    names = ("batch_size", "world_size", "micro_batch", "precision", "optimizer", "parallel", "comm", "ema", "device")
    found = plan(model, **{name: getattr(args, name) for name in names})
    largest, even = found.largest_micro_batch(memory), found.even_micro_batch(memory)
    if args.micro_batch is None:
        found = replace(found, micro_batch=even or 1)

    print(f"{args.model}, {table(found)}\n")
    if largest == found.pairs:
        print(f"all {largest:,} pairs of a process fit into {told(memory)} at once: no gradient caching is needed")
    elif largest:
        print(f"largest micro-batch in {told(memory)}: {largest:,} of a process's {found.pairs:,} pairs; use {even:,}")
    else:
        helps = ", ".join(remedies(found, grad_checkpointing=args.grad_checkpointing))
        one = told(replace(found, micro_batch=1).total)
        print(f"not even one pair at a time fits into {told(memory)}: it takes {one}; what helps: {helps}")
    print(f"on the host: {told(found.host)} of images and texts a step and process, as much again for the next step")
    return int(not largest or found.total > memory)


def _models(args: argparse.Namespace) -> None:
    from fastclip.models.config import list_models

    print("\n".join(list_models()))
