"""Options for the outputs of a command, and checks of each output before any work begins."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fastclip.cli.help import add_training_option

__all__ = ["add_force", "add_samples_per_shard", "check_apart", "check_folder", "owned_files", "owned_output"]

_DATA = ("spec", "data", "val_data", "test_data")
_FILES = ("folder", "checkpoint", "classes", "queries", "templates", "vocabulary", "results")


def add_force(parser: argparse.ArgumentParser) -> None:
    """Add ``--force``, for `owned_output` and `owned_files`."""
    add_training_option(parser, "force", action="store_true")


def add_samples_per_shard(parser: argparse.ArgumentParser) -> None:
    """Add ``--samples-per-shard``."""
    parser.add_argument("--samples-per-shard", type=int, default=10_000, metavar="N", help="samples per tar shard")


@contextmanager
def owned_output(args: argparse.Namespace, name: str = "output") -> Iterator[None]:
    """Create and lock the folder that the option `name` gives (`fastclip.system.owner`).

    Inside the ``with`` block, the option is a Path.

    Raises:
        OSError, ValueError: the folder cannot be created, another command owns it, or `check_folder` refuses it. The
            message names the folder.
    """
    from fastclip.system.owner import owned

    folder = getattr(args, name)
    check_folder(folder, _given(args, _DATA))
    with owned(folder, force=args.force) as made:
        setattr(args, name, made)
        yield


@contextmanager
def owned_files(args: argparse.Namespace, *names: str) -> Iterator[None]:
    """Lock the files that the options `names` give.

    Inside the ``with`` block, the files can be written, and the options are Paths.

    Raises:
        OSError, ValueError: a file cannot be written, another command owns it, or this command reads it. The message
            names the file.
    """
    from fastclip.system.owner import output_path, owned_file

    options: dict[str, str] = {}  # names of options by their files
    with ExitStack() as stack:
        for name in names:
            if (file := getattr(args, name)) is not None:
                option = "--" + name.replace("_", "-")
                if (other := options.setdefault(os.path.realpath(output_path(file)), option)) != option:
                    raise ValueError(f"{other} and {option} are both {file}: choose two different files")
                data: list[str | Path] = [*_given(args, _DATA), *map(Path, _given(args, ("folder",)))]
                check_apart(file, [*data, *map(Path, _given(args, _FILES))], option=option)
                _check_new(output_path(file), data, option)
                stack.enter_context(owned_file(file, force=args.force))
                setattr(args, name, output_path(file))
        yield


def check_apart(output: str | Path, inputs: Iterable[str | Path], *, option: str = "--output") -> None:
    """Raise ValueError if `output` is one of `inputs`: Paths, or specs in any form that ``--data`` takes."""
    from fastclip.system.owner import output_path

    if not (path := output_path(output)).exists():
        return
    for place in _places(inputs):
        if os.path.exists(place) and os.path.samefile(path, place):
            raise ValueError(f"{option} {output} is an input of the command: choose another path")


def check_folder(output: str | Path, data: Iterable[str], *, option: str = "--output") -> None:
    """Raise ValueError if the folder `output` is one of `data`, or would be read as one more class folder of `data`."""
    from fastclip.data.spec import spec_places
    from fastclip.system.owner import output_path

    check_apart(output, data, option=option)
    path = Path(os.path.realpath(output_path(output)))
    for place in (place for spec in data for place in spec_places(spec) if os.path.isdir(place)):
        if path.is_relative_to(within := Path(os.path.realpath(place))) and path != within:
            top = path.relative_to(within).parts[0]
            if not top.startswith(".") and (classes := _class_folders(place)) and top not in classes:
                raise ValueError(
                    f"{option} {output} is in {place}, where each folder is a class of the data, so that it would be "
                    "read as one more class: choose a path outside"
                )


def _class_folders(folder: Path) -> set[str]:
    """Return the names of the subfolders if `folder` has one per class, without captions; otherwise an empty set."""
    from fastclip.data.files import subfolders
    from fastclip.data.sources.folder import pictures

    if any(file.captioned or not os.path.dirname(file.name) for file in pictures(folder, links=[])):
        return set()
    # Links to folders are classes as well, although the walk does not follow them
    return {name for name in subfolders(folder) if any(True for _ in pictures(folder / name, links=[]))}


def _check_new(file: Path, data: Iterable[str | Path], option: str) -> None:
    """Raise ValueError if `file` is an image in a folder of `data`, or has the name of an image's caption file there.

    An image that a command has drawn there before does not belong to the data, and may be replaced.
    """
    if not file.is_file() or not (data := list(data)):
        return
    from fastclip.data.picture import is_drawn
    from fastclip.data.sources.folder import is_picture

    places = [place for place in _places(data) if os.path.exists(place)]
    folders = {os.path.realpath(place if place.is_dir() else place.parent) for place in places}
    # A link is checked as well as its target
    for path in {Path(os.path.realpath(file.parent), file.name), Path(os.path.realpath(file))}:
        if any(path.is_relative_to(folder) for folder in folders):
            for other in path.parent.iterdir():
                if other.stem == path.stem and is_picture(other.name) and not is_drawn(other):
                    raise ValueError(f"{option} {file} exists and is part of the data: choose another path")


def _given(args: argparse.Namespace, names: Iterable[str]) -> list[str]:
    values = [value for name in names if (value := getattr(args, name, None)) is not None]
    return [str(item) for value in values for item in (value if isinstance(value, list) else [value])]


def _places(inputs: Iterable[str | Path]) -> Iterator[Path]:
    """Yield the files and folders of the inputs, and for a shard its folder as well."""
    from fastclip.data.spec import spec_places

    for given in inputs:
        for place in [given] if isinstance(given, Path) else spec_places(given):
            yield place
            if place.suffix == ".tar":
                yield place.parent
