"""``fastclip train``: train an image-text model; tyro reads the options (`fastclip.training.options`)."""

from __future__ import annotations

import argparse
import logging

from fastclip.cli.help import HELP, OptionsHelp, describe
from fastclip.cli.printing import say
from fastclip.system.plural import counted

__all__ = ["add"]


def add(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Train an image-text model.",
        "fastclip train --data digits --val-data digits --model ViT-tiny --context-length 16 --output runs/digits",
        "fastclip train --data 'shards/{0000..0099}.tar' --model ViT-B-32 --precision bf16 \\\n"
        "    --batch-size 32768 --micro-batch 512 --output runs/b32 --resume auto",
        "torchrun --nproc-per-node 8 --no-python fastclip train --config runs/b32/config.yaml --output runs/b32-8",
    )
    parser.add_argument("-h", "--help", action=OptionsHelp, options_help=_options_help, alone=True, help=HELP)
    parser.set_defaults(run=_train)


def _options_help() -> None:
    from fastclip.training.options import parse_options

    parse_options(["--help"])


def _train(args: argparse.Namespace) -> None:
    from fastclip.cli.outputs import check_folder
    from fastclip.system.env import launched
    from fastclip.training.options import parse_options

    options = parse_options(args.words)
    check_folder(options.output, [spec for spec in (options.data, options.val_data) if spec is not None])
    from fastclip.training import train

    process = launched()
    first = process is None or process.rank == 0
    logger = logging.getLogger("fastclip")
    logger.setLevel(logging.INFO if first else logging.ERROR)
    if args.threads_sleep:
        logger.info(
            "OpenMP's threads sleep while they wait, because programs may share the cores (%s)", args.threads_sleep
        )
    run = train(options)
    if first:
        steps = f"{counted(run.steps, 'step')} in all, {len(run.losses):,} of them in this run in {run.seconds:.1f} s"
        say(f"{run.folder}: {steps}, with backend {run.backend!r}")
        results = {"loss": run.losses[-1], **run.validation} if run.losses else {}
        say("  ".join(f"{name} {value:.4g}" for name, value in results.items()))
