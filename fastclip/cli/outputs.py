"""What a command writes: its options, and the checks before any work."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

__all__ = ["add_force", "check_apart", "owned_files", "owned_output"]

_DATA = ("spec", "data", "val_data", "test_data")
_FILES = (*_DATA, "checkpoint", "classes", "queries", "templates", "vocabulary", "results")


def add_force(parser: argparse.ArgumentParser) -> None:
    """``--force``, for `owned_output` and `owned_files`."""
    parser.add_argument(
        "--force",
        action="store_true",
        help="take the output over from a command on another host that has ended without giving it back",
    )


@contextmanager
def owned_output(args: argparse.Namespace) -> Iterator[None]:
    """Inside, the folder ``--output``, a Path now, is there and this command's (`fastclip.owner`).

    Raises:
        OSError, ValueError: it cannot be, is another command's, or is the data's own folder; it is named.
    """
    from fastclip.owner import owned

    check_apart(args.output, _given(args, _DATA))
    with owned(args.output, force=args.force) as args.output:
        yield


@contextmanager
def owned_files(args: argparse.Namespace, *names: str) -> Iterator[None]:
    """Inside, the files that the options `names` give, Paths now, can be written and are this command's.

    Raises:
        OSError, ValueError: one cannot be, is another command's, or is a file that this command reads; it is named.
    """
    from fastclip.owner import output_path, owned_file

    options: dict[str, str] = {}  # by the file that they give
    with ExitStack() as stack:
        for name in names:
            if (file := getattr(args, name)) is not None:
                option = "--" + name.replace("_", "-")
                if (other := options.setdefault(os.path.realpath(output_path(file)), option)) != option:
                    raise ValueError(f"{other} and {option} are both {file}: name two files")
                check_apart(file, _given(args, _FILES), option=option)
                stack.enter_context(owned_file(file, force=args.force))
                setattr(args, name, output_path(file))
        yield


def check_apart(output: str | Path, inputs: Iterable[str | Path], *, option: str = "--output") -> None:
    """ValueError where `output` is one of `inputs`: paths, or data as of ``fastclip train --data``."""
    from fastclip.owner import output_path

    path = output_path(output)
    for given in inputs:
        for place in _places(str(given)):
            if path.exists() and place.exists() and os.path.samefile(path, place):
                raise ValueError(f"{option} {output} is what the command reads: name another place")


def _given(args: argparse.Namespace, names: Iterable[str]) -> list[str]:
    values = [value for name in names if (value := getattr(args, name, None)) is not None]
    return [str(one) for value in values for one in (value if isinstance(value, list) else [value])]


def _places(spec: str) -> Iterator[Path]:
    """The files and folders of a SPEC; of shards their folder, too."""
    for part in [spec] if os.path.exists(spec) else spec.split("::"):
        unweighted = re.sub(r"^[\d.]+\*(?=.)", "", part)
        for one in {part, unweighted, unweighted.partition(".json:")[0] + ".json"}:
            yield Path(one)
            if one.endswith(".tar"):
                yield Path(one).parent
