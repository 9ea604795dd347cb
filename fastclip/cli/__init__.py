"""The ``fastclip`` command, one module a subcommand. Each imports what it needs when it runs."""

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
from fastclip.cli.printing import LogLines, complain, leave_stdout, prepare_streams
from fastclip.system.env import let_threads_sleep

__all__ = ["main"]

_COMMANDS = {
    "train": (train, "train an image-text model"),
    "finetune": (finetune, "fine-tune the image tower as a classifier"),
    "plan": (plan, "predict the memory of a training step, and the largest micro-batch"),
    "eval": (evaluate, "zero-shot, robustness, retrieval, probes: what a model is worth"),
    "report": (report, "write a run as an HTML page: curves, confused classes, best and worst retrievals"),
    "search": (search, "find pictures of a folder by text, by picture, or by a mixture of these"),
    "serve": (serve, "search a folder on a web page of this machine"),
    "data": (data, "check a data set, or pack one into tar shards"),
    "filter": (filter, "keep the samples of a data set whose picture and caption agree, without near duplicates"),
    "embed": (embed, "write a data set as vectors, in clip-retrieval's layout"),
    "models": (models, "list the models by name"),
    "convert": (convert, "write a checkpoint in open_clip's, Hugging Face's or our form"),
    "doctor": (doctor, "what is installed, what runs here and why not, and what to do about it"),
    "bench": (bench, "time the losses on this machine beside open_clip's and the dense formula"),
    "parity": (parity, "compare the losses of several processes with those of one"),
}
_OF_SEARCH = ("search", "serve", "filter", "embed")  # what these need is the extra search, else train
_OWN_PARSER = ("train", "finetune")  # these read words that are unknown here, and --help, themselves


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Return the exit status: 1 for what the user can mend, said on stderr, and what fails."""
    if argv is None:  # the process is this command's; a caller's streams and environment are its own
        prepare_streams()
    parser = _parser()
    args, words = parser.parse_known_args(argv)
    args.words = words  # of a command with a parser of its own
    if words and args.command not in _OWN_PARSER:
        parser.error(f"unrecognized arguments: {' '.join(words)}")
    log = logging.StreamHandler()
    log.setFormatter(LogLines("fastclip: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[log])
    try:
        args.threads_sleep = argv is None and args.command != "bench" and let_threads_sleep()
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
    except BrokenPipeError:  # whoever reads has enough, as in `fastclip models | head`
        leave_stdout()
        return 0
    except Exception as error:
        if (message := message_of(error, args.command)) is None:
            raise
        complain(f"fastclip {args.command}: {message}{_advice(args.command, error)}")
        return 1
    finally:
        if argv is None:  # a last search for cyclic garbage in all that torch loaded takes a second
            gc.freeze()


def _advice(command: str, error: Exception) -> str:
    """Return which extra brings a package that is not installed; empty for another error."""
    if not (isinstance(error, ModuleNotFoundError) or str(error).endswith("is not installed")):
        return ""
    extra = "search" if command in _OF_SEARCH else "train"
    return f"; pip install '.[{extra}]' in the clone brings what this command needs"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastclip", description="Contrastive image-text models.")
    parser.add_argument("--version", action="version", version=f"fastclip {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in _COMMANDS.items():
        foreign = name in _OWN_PARSER  # an abbreviation may be of the other parser's options
        module.add(commands.add_parser(name, help=summary, add_help=not foreign, allow_abbrev=not foreign))
    return parser
