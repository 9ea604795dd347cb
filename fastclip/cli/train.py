"""``fastclip train``, whose options a parser of its own reads."""

from __future__ import annotations

import argparse
import logging

from fastclip.cli.printing import say

__all__ = ["add"]


def add(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_train)


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
        logger.info("the cores are busy: OpenMP's threads sleep while they wait (OMP_WAIT_POLICY=PASSIVE)")
    run = train(options)
    if first:
        say(f"{run.folder}: {run.steps} steps, of which {len(run.losses)} in {run.seconds:.1f} s, by {run.backend!r}")
        results = {"loss": run.losses[-1], **run.validation} if run.losses else {}
        say("  ".join(f"{name} {value:.4g}" for name, value in results.items()))
