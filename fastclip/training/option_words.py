"""Help of the options of a dataclass, made from the docstrings below its fields.

Both `tyro.cli` and the commands with the same options in argparse show it, so that each option is worded once.

Imports nothing heavy, so that ``--help`` answers at once.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, field, fields, make_dataclass
from functools import cache
from itertools import pairwise
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = ["OptionWords", "joined", "option_words", "parse_dataclass"]

_DEFAULT = re.compile(r" (\(default: .*\))$")
_METAVARS = {int: "N", float: "X", str: "NAME"}
_NAMED = {
    **dict.fromkeys(("data", "val_data"), "SPEC"),
    **dict.fromkeys(("pretrained", "resume"), "PATH"),
    "output": "DIR",
    "max_bad": "SHARE",
    "betas": "BETA1 BETA2",
    "prefixes": "N [N ...]",
    "distill": "PATH [PATH ...]",
    "wandb": "PROJECT",
    "timeout": "SECONDS",
}
_NAMES = ("Weights & Biases",)  # proper nouns with which a docstring begins
_UNIONS = (Union, UnionType)
T = TypeVar("T")


class OptionWords(NamedTuple):
    """Help of one option."""

    text: str
    """One line without a full stop at its end, which begins in lower case unless it begins with a proper noun or an
    abbreviation."""
    default: str
    """``(default: ...)``; empty for a required option."""
    metavar: str | None
    """Name of the value, or its choices in braces; None for a flag."""


@cache
def option_words(options: type) -> dict[str, OptionWords]:
    """Return the help of each field of the dataclass `options`, by the field's name.

    A docstring may end in ``(default: ...)``, which is then shown in place of the field's default. The docstring of a
    field whose default is None must end that way.
    """
    docstrings, types = _docstrings(options), get_type_hints(options)
    return {f.name: _words(f, docstrings[f.name], types[f.name]) for f in fields(options)}


def parse_dataclass(
    options: type[T], *, prog: str, description: str, args: Sequence[str], also: Mapping[str, OptionWords] | None = None
) -> T:
    """Read a command line with tyro and return an instance of the dataclass `options`.

    The help texts come from `option_words`, and from `also` for options that the caller has already read from `args`.

    tyro alone would keep the line breaks of the docstrings and show ``{None}|INT`` and ``(default: None)``. A subclass
    whose annotations carry the help is parsed instead, because the module of the dataclass must not import tyro.
    """
    import tyro

    def described(name: str, kind: Any, words: OptionWords, value: Any) -> tuple[str, Any, Any]:
        settings = tyro.conf.arg(help=words.text, help_behavior_hint=words.default, metavar=words.metavar)
        return name, Annotated[kind, settings], field(default=value)

    kind: Any = options
    types, words = get_type_hints(kind), option_words(kind)
    # tyro gives only a plain bool two flags, --NAME and --no-NAME. Without either of them the value stays None
    unset = {name for name, type_ in types.items() if type_ == bool | None and not _has_flag(name, args)}
    plain = {name: bool if type_ == bool | None else type_ for name, type_ in types.items()}
    defaults = {f.name: False if types[f.name] == bool | None else f.default for f in fields(kind)}
    shown_fields = [described(name, plain[name], words[name], value) for name, value in defaults.items()]
    shown_fields += [described(name, str | None, read, None) for name, read in (also or {}).items()]
    shown = make_dataclass(options.__name__, shown_fields, bases=(options,), frozen=True)
    parsed: Any = tyro.cli(shown, prog=prog, description=description, args=args)
    return options(**{name: None if name in unset else getattr(parsed, name) for name in words})


def joined(flag: str, args: Sequence[str]) -> list[str]:
    """Return `args` with the values of all occurrences of an option behind its first: ``--a 1 --a 2`` as ``--a 1 2``.

    tyro would keep those of the last occurrence alone.
    """
    values: list[str] = []
    rest: list[str] = []
    first, taking = -1, False
    for word in args:
        name, equals, value = word.partition("=")
        if name == flag:
            first, taking = len(rest) if first < 0 else first, not equals
            values += [value] if equals else []
        elif taking and not word.startswith("-"):
            values.append(word)
        else:
            taking = False
            rest.append(word)
    return rest if first < 0 else [*rest[:first], flag, *values, *rest[first:]]


def _has_flag(name: str, args: Sequence[str]) -> bool:
    return any(word.replace("_", "-") in [f"--{no}{name}".replace("_", "-") for no in ("", "no-")] for word in args)


def _docstrings(options: type) -> dict[str, str]:
    """Return the docstrings below the fields as one line each."""
    (definition,) = ast.parse(inspect.getsource(options)).body
    assert isinstance(definition, ast.ClassDef)
    docstrings = {}
    for assigned, below in pairwise(definition.body):
        if isinstance(assigned, ast.AnnAssign) and isinstance(below, ast.Expr):
            docstrings[ast.unparse(assigned.target)] = " ".join(ast.literal_eval(below.value).split())
    return docstrings


def _words(option: Field[Any], docstring: str, kind: Any) -> OptionWords:
    text = docstring.removesuffix(".")
    default = ""
    if worded := _DEFAULT.search(text):
        text, default = text[: worded.start()], worded[1]
    elif option.default is True:
        default = "(default: on)"
    elif option.default is False:
        default = "(default: off)"
    elif option.default is not MISSING:
        values = option.default if isinstance(option.default, tuple) else (option.default,)
        default = f"(default: {' '.join(map(str, values))})"
    return OptionWords(_lowered(text), default, _metavar(option.name, kind))


def _lowered(text: str) -> str:
    """Return `text` with its first letter in lower case, unless it begins with a proper noun or an abbreviation.

    Words with another capital, such as TensorBoard and YAML, are recognised; other proper nouns are listed in `_NAMES`.
    """
    first = text.partition(" ")[0]
    if text.startswith(_NAMES) or any(map(str.isupper, first[1:])):
        return text
    return text[:1].lower() + text[1:]


def _metavar(name: str, kind: Any) -> str | None:
    kinds = [part for part in get_args(kind) if part is not type(None)] if get_origin(kind) in _UNIONS else [kind]
    if len(kinds) > 1:
        return "|".join("|".join(get_args(part)) or _METAVARS[part] for part in kinds[::-1])  # auto|N
    (kind,) = kinds
    if get_origin(kind) is Literal:
        return "{" + ",".join(get_args(kind)) + "}"
    return None if kind is bool else _NAMED.get(name) or _METAVARS[kind]
