"""Positional arguments and options in any order, including words that begin with a hyphen but are not options."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

__all__ = ["words_in_any_order"]


def words_in_any_order(parser: argparse.ArgumentParser) -> None:
    """Let options appear between the positional arguments of `parser`, as in ``QUERY --top 3 FOLDER``.

    A word such as ``-night``, whose letters are not all options, is positional as well. Without this
    function, argparse of Python 3.10 and 3.11 would conclude at the first option that an optional positional argument
    is missing. ``parse_intermixed_args`` does not work for a subcommand.
    """
    plain = parser.parse_known_args  # subcommands are parsed by this method

    def parse(args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        options, words = _split(parser, list(args or ()))
        return plain([*options, "--", *words] if words else options, namespace)

    parser.parse_known_args = parse  # type: ignore[method-assign, assignment]


def _split(parser: argparse.ArgumentParser, args: list[str]) -> tuple[list[str], list[str]]:
    """Return options with their values, and positional arguments."""
    known = {name: action for action in parser._actions for name in action.option_strings}
    options, words = list[str](), list[str]()
    while args:
        word = args.pop(0)
        if word == "--":
            return options, words + args
        if not _is_option(word, known):
            words.append(word)
            continue
        value = [args.pop(0)] if args and _wants_value(word, known) else []
        # A value that begins with a hyphen is joined to its option by "=", or argparse would read it as an option
        if value and value[0].startswith("-") and word.startswith("--"):
            word, value = f"{word}={value[0]}", []
        options += [word, *value]
    return options, words


def _is_option(word: str, known: dict[str, argparse.Action]) -> bool:
    if word.startswith("--"):
        return not re.search(r"\s", word.partition("=")[0])  # a text in quotes may begin with a dash
    flags = "".join(name[1] for name, action in known.items() if len(name) == 2 and action.nargs == 0)
    valued = "".join(name[1] for name, action in known.items() if len(name) == 2 and action.nargs != 0)
    return re.fullmatch(rf"-(?=.)[{flags}]*(?:[{valued}]=?\d*)?", word) is not None


def _wants_value(word: str, known: dict[str, argparse.Action]) -> bool:
    """Return True if the next word is the value of option `word`; an abbreviation means the first option it fits."""
    if not word.startswith("--"):
        return known[f"-{word[-1]}"].nargs != 0 if f"-{word[-1]}" in known else False
    action = known.get(word) or next((known[name] for name in known if name.startswith(word)), None)
    return action is not None and action.nargs != 0
