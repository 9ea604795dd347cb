"""Help of the commands: wrapped prose, the default of every option, and examples at the end."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from typing import Any

from fastclip.cli.printing import leave_stdout
from fastclip.system.installed import install_advice
from fastclip.training.option_words import option_words
from fastclip.training.options import TrainOptions, flag

__all__ = ["HELP", "HelpFormatter", "OptionsHelp", "add_training_option", "describe"]

HELP = "show this help message and exit"  # as argparse and tyro put it
_EXAMPLES = "examples:\n  "


class HelpFormatter(argparse.HelpFormatter):
    """Layout of the help: a description is wrapped, examples keep their lines, and defaults are appended."""

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):  # argparse forgets that subcommands are indented once more
            indented = 2 * self._indent_increment + max(map(len, action.choices))
            self._action_max_length = max(self._action_max_length, indented)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(_EXAMPLES) else super()._fill_text(text, width, indent)

    def _get_help_string(self, action: argparse.Action) -> str:
        """Return the help, with ``(default: ...)`` or ``(required)`` added if it does not yet state the default."""
        text = action.help or ""
        if action.required and action.option_strings:
            return f"{text} (required)"
        if any(action.default is value for value in (None, False, True, argparse.SUPPRESS)) or "(default: " in text:
            return text
        return f"{text} (default: %(default)s)"


def describe(parser: argparse.ArgumentParser, description: str, *examples: str) -> None:
    """Give `parser` its description and, at the end of its help, examples: command lines of one or several lines."""
    parser.formatter_class = HelpFormatter
    parser.description = description
    parser.epilog = _EXAMPLES + "\n".join(examples).replace("\n", "\n  ")


def add_training_option(
    parser: argparse.ArgumentParser, name: str, *, default_words: str = "", **settings: Any
) -> None:
    """Add the option that ``fastclip train`` has for a field of `TrainOptions`, in the same words.

    Args:
        default_words: description of what happens without the option, if `settings` has no default.
        settings: further arguments of `argparse.ArgumentParser.add_argument`.
    """
    text, _, metavar = option_words(TrainOptions)[name]
    if settings.get("action") != "store_true":
        settings = {"metavar": metavar} | settings
    parser.add_argument(flag(name), help=text + (f" (default: {default_words})" if default_words else ""), **settings)


class OptionsHelp(argparse.Action):
    """Print the help of a command whose other options are read by tyro, with the examples last, and exit.

    Args:
        options_help: prints the help of those options, and exits.
        alone: show only the help of those options, because this parser has none of its own.
    """

    def __init__(
        self,
        option_strings: Sequence[str],
        dest: str,
        *,
        options_help: Callable[[], object],
        alone: bool = False,
        help: str | None = None,
    ) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)
        self.options_help, self.alone = options_help, alone

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        examples, parser.epilog = parser.epilog, None
        try:
            if not self.alone:
                parser.print_help()
                print()
            self._print_options()
            print(f"\n{examples}")
            sys.stdout.flush()
        except ModuleNotFoundError as error:  # raised while arguments are parsed, where `main` does not see it
            parser.exit(
                1, f"{parser.prog}: to see the training options, which need {error.name}, {install_advice('train')}\n"
            )
        except BrokenPipeError:  # the reader has seen enough, as in `fastclip train --help | head`
            leave_stdout()
        finally:
            parser.epilog = examples
        parser.exit()

    def _print_options(self) -> None:
        """Print the help of the other options, without its usage line if this parser has shown one for all options."""
        printed = _Printed(sys.stdout)
        try:
            with nullcontext() if self.alone else redirect_stdout(printed):
                self.options_help()
        except SystemExit as end:  # tyro exits after it has printed its help
            if end.code:
                raise
        if not self.alone:
            usage, _, text = printed.getvalue().partition("\n\n")
            print(text or usage, end="")


class _Printed(io.StringIO):
    """Text that is printed as if to `stream`, whose encoding and colours tyro looks up."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return str(self._stream.encoding)

    def isatty(self) -> bool:
        return bool(self._stream.isatty())
