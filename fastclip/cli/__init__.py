"""The ``fastclip`` command. Each subcommand is a module, which imports what it needs when it runs."""

from __future__ import annotations

import argparse
import gc
import logging
import sys
from collections.abc import Sequence

from fastclip._version import __version__
from fastclip.cli import (
    bench,
    convert,
    data,
    doctor,
    embed,
    evaluate,
    filter,
    finetune,
    models,
    parity,
    plan,
    report,
    search,
    serve,
    train,
)
from fastclip.cli.ending import Terminated, message_of, sigterm_raises
from fastclip.cli.help import describe
from fastclip.cli.printing import LogLines, complain, leave_stdout, prepare_streams
from fastclip.system.env import let_threads_sleep
from fastclip.system.installed import install_advice

__all__ = ["main"]

_COMMANDS = {
    "train": (train, "train an image-text model"),
    "finetune": (finetune, "fine-tune the image tower as a classifier"),
    "plan": (plan, "predict the memory of a run and its largest micro-batch"),
    "eval": (evaluate, "evaluate a model: zero-shot, robustness, retrieval, probes"),
    "report": (report, "write an HTML report of a training run"),
    "search": (search, "find images of a folder by text, by image, or by both"),
    "serve": (serve, "search a folder on a local web page"),
    "data": (data, "check a dataset, or pack it into tar shards"),
    "filter": (filter, "keep the samples whose image and caption agree"),
    "embed": (embed, "compute the embeddings of a dataset, in clip-retrieval's layout"),
    "models": (models, "list the names of the models"),
    "convert": (convert, "convert a checkpoint to open_clip, Hugging Face or fastclip"),
    "doctor": (doctor, "check this installation: what runs here, and what does not"),
    "bench": (bench, "time the losses on this machine beside open_clip's"),
    "parity": (parity, "compare the losses of several processes with those of one process"),
}
# These commands need the extra `search`, all others the extra `train`
_OF_SEARCH = ("search", "serve", "filter", "embed")
_OWN_PARSER = ("train", "finetune")  # tyro reads the options of these


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status.

    The status is 0, or 1 if a check fails or an error is reported on stderr, 130 after Ctrl-C, and 143 after SIGTERM.
    Wrong arguments raise SystemExit with status 2.
    """
    if argv is None:  # called as a program; for a caller in Python, streams and environment stay unchanged
        prepare_streams()
    parser = _parser()
    args, words = parser.parse_known_args(argv)
    args.words = words  # the words that tyro reads
    if words and args.command not in _OWN_PARSER:
        parser.error(f"unrecognized arguments: {' '.join(words)}")
    log = logging.StreamHandler()
    log.setFormatter(LogLines("fastclip: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[log])
    try:
        args.threads_sleep = let_threads_sleep() if argv is None and args.command != "bench" else ""
        with sigterm_raises():
            status = args.run(args) or 0
            sys.stdout.flush()
            return status
    except KeyboardInterrupt:
        print(f"fastclip {args.command}: interrupted", file=sys.stderr)
        return 130
    except Terminated:
        print(f"fastclip {args.command}: ended by SIGTERM", file=sys.stderr)
        return 143
    except BrokenPipeError:  # the reader has seen enough, as in `fastclip models | head`
        leave_stdout()
        return 0
    except Exception as error:
        if (message := message_of(error, args.command)) is None:
            raise
        complain(f"fastclip {args.command}: {message}{_advice(args.command, error)}")
        return 1
    finally:
        if argv is None:  # at exit, a search for cyclic garbage in everything torch loaded would take a second
            gc.freeze()


def _advice(command: str, error: Exception) -> str:
    """Return the advice to install the extra that contains a missing package; empty for any other error."""
    if not (isinstance(error, ModuleNotFoundError) or str(error).endswith("is not installed")):
        return ""
    extra = "search" if command in _OF_SEARCH else "train"
    if getattr(error, "name", None) == "datasets":  # of the Hugging Face Hub
        extra = "hf"
    return f"; to install what this command needs, {install_advice(extra)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastclip")
    describe(
        parser,
        "Train, evaluate and use contrastive image-text models. `fastclip COMMAND --help` explains a command.",
        "fastclip doctor",
        "fastclip train --data digits --model ViT-tiny --context-length 16 --output runs/digits",
        "fastclip eval zeroshot --checkpoint runs/digits --data digits",
        'fastclip search "a red car" photos --checkpoint runs/b32',
    )
    parser.add_argument("--version", action="version", version=f"fastclip {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in _COMMANDS.items():
        # argparse must not expand an abbreviation that could be an option of tyro's parser
        foreign = name in _OWN_PARSER
        module.add(commands.add_parser(name, help=summary, add_help=not foreign, allow_abbrev=not foreign))
    return parser
