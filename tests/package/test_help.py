"""The help of every command: plain lines, real defaults, the same words for the same option, examples that parse."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from support import needs

needs("train")

from fastclip import cli
from fastclip.training.option_words import option_words
from fastclip.training.options import FinetuneOptions, TrainOptions, flag, parse_finetune, parse_options

READ_BY_TYRO = {"train": (TrainOptions, parse_options), "finetune": (FinetuneOptions, parse_finetune)}
# Names that keep their capitals at the beginning of a line
NAMES = {"CSV", "HTML", "JPEG", "JSON", "PNG"}
PROPER_NOUNS = ("Weights & Biases ",)
NO_BEGINNING = {
    *(
        "a",
        "also",
        "an",
        "and",
        "as",
        "at",
        "but",
        "by",
        "default",
        "for",
        "from",
        "how",
        "in",
        "it",
        "its",
        "likewise",
    ),
    *("no", "not", "of", "on", "one", "only", "or", "same", "such", "that", "the", "their", "these", "this", "those"),
    *("to", "what", "where", "which", "who", "whose", "with"),
}
LABELLED = ("finetune", "eval zeroshot", "eval probe")
# Options whose words differ in these commands from those of all other commands, and why
MEANS_SOMETHING_ELSE: dict[str, dict[str | tuple[str, ...], str]] = {
    "--batch-size": {
        ("train", "plan"): "pairs of a training step; the other commands embed images",
        "finetune": "images of a training step",
    },
    "--data": {
        "train": "lists the forms to which all other commands refer",
        LABELLED: "images with classes, which not every dataset has",
    },
    "--details": {"eval retrieval": "results of queries, not of classes"},
    "--device": {"plan": "the device of a run that comes later"},
    "--dtype": {"embed": "the type of written vectors, not of features"},
    "--ema": {"plan": "a flag: the decay does not change the memory"},
    "--image-size": {"data pack": "resizes images; no model is involved"},
    "--json": {"search": "a flag; doctor takes a file"},
    "--loss": {"bench": "a loss function, not a recipe of training"},
    "--max-bad": {"data check": "no sample replaces another, and there is no run to stop"},
    "--micro-batch": {"finetune": "no gradient caching: the loss of an image needs no other image"},
    "--reference": {("finetune", "eval probe"): "lists twelve datasets; eval retrieval has two choices"},
    "--sheet": {"eval compose": "a row for each of many queries"},
    "--val-data": {"finetune": "images with classes", "eval probe": "chooses the penalty"},
    "--workers": {"train": "several training processes", ("search", "serve"): "threads"},
}
# Every command writes something else, reads something else, or draws something else at random
ALWAYS_OWN_WORDS = {"--output", "--seed", "SPEC"}


class Line(NamedTuple):
    """One option or positional argument of a command, as its help shows it."""

    command: str
    name: str  # the last of its spellings, or the metavar of a positional argument
    text: str
    default: str  # "(default: ...)", or ""
    metavar: str | None
    required: bool
    is_flag: bool

    def __str__(self) -> str:
        return f"{self.command} {self.name}"


def parsers(parser: argparse.ArgumentParser, command: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield the names of all commands and their parsers, the parser of ``fastclip`` itself as ""."""
    yield command, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, one in action.choices.items():
                yield from parsers(one, f"{command} {name}".strip())


def lines_of_argparse(command: str, parser: argparse.ArgumentParser) -> Iterator[Line]:
    formatter = parser._get_formatter()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:
                yield Line(f"{command} {choice.dest}".strip(), "summary", choice.help or "", "", None, True, False)
        elif action.dest not in ("help", "version"):
            shown = formatter._expand_help(action)
            text, begin, end = shown.partition(" (default: ")
            default = f"{begin}{end}".strip()
            name = action.option_strings[-1] if action.option_strings else str(action.metavar)
            metavar = f"{{{','.join(action.choices)}}}" if action.choices else action.metavar
            assert metavar is None or isinstance(metavar, str)
            text = text.removesuffix(" (required)")
            yield Line(command, name, text, default, metavar, action.required, action.nargs == 0)


def lines_of_tyro(command: str, options: type) -> Iterator[Line]:
    for name, (text, default, metavar) in option_words(options).items():
        required = options.__dataclass_fields__[name].default is dataclasses.MISSING  # type: ignore[attr-defined]
        yield Line(command, flag(name), text, default, metavar, required, metavar is None)


PARSERS = dict(parsers(cli._parser()))
LINES = [line for command, parser in PARSERS.items() for line in lines_of_argparse(command, parser)]
LINES += [line for command, (options, _) in READ_BY_TYRO.items() for line in lines_of_tyro(command, options)]


def test_all_commands_are_seen() -> None:
    assert {"train", "finetune", "search", "eval probe", "data pack", "doctor"} <= PARSERS.keys()
    assert len(LINES) > 250 and {"--timeout", "--freeze-image", "--wise-ft", "QUERY"} <= {line.name for line in LINES}


def test_lines_are_plain() -> None:
    """Each begins with a noun or a verb, in lower case unless it is a proper noun, and ends without a full stop."""
    wrong = []
    for line in LINES:
        first = re.split(r"[\s.,:;]", line.text)[0]
        named = first in NAMES or line.text.startswith(PROPER_NOUNS)
        if not (named or re.fullmatch("[a-z][a-z-]*", first)) or first in NO_BEGINNING:
            wrong.append(f"{line} begins with {first!r}")
        if not line.text.isprintable() or re.search(r"  |default|\.$|\(required\)", line.text):
            wrong.append(f"{line}: {line.text}")
        if not line.is_flag and line.name != "summary" and (line.metavar is None or "None" in line.metavar):
            wrong.append(f"{line} shows the value as {line.metavar}")
    assert wrong == []


@dataclasses.dataclass
class Worded:
    project: str
    """Weights & Biases project."""
    weights: str
    """Weights of the model."""
    events: str
    """TensorBoard events."""
    config: str
    """YAML file with options."""
    decay: str
    """A number."""


def test_proper_nouns_and_abbreviations_keep_their_capitals() -> None:
    texts = [words.text for words in option_words(Worded).values()]
    assert texts == [
        "Weights & Biases project",
        "weights of the model",
        "TensorBoard events",
        "YAML file with options",
        "a number",
    ]
    assert option_words(TrainOptions)["wandb"].text.startswith("Weights & Biases project")


def test_lines_state_their_defaults() -> None:
    wrong = []
    for line in LINES:
        if line.required and line.default:
            wrong.append(f"{line} is required, and has a default")
        elif not (line.required or line.is_flag) and not re.fullmatch(r"\(default: \S.*\)", line.default):
            wrong.append(f"{line} states no default")
        elif line.default == "(default: None)":
            wrong.append(f"{line} states None")
    assert wrong == []


def test_defaults_are_those_of_the_parsers() -> None:
    """Values that a parser knows appear as they are; where a help line words a number, it is that number."""
    for command, parser in PARSERS.items():
        shown = {line.name: line.default for line in LINES if line.command == command}
        for action in parser._actions:
            known = isinstance(action.default, (int, float, str)) and action.default != argparse.SUPPRESS
            if known and action.option_strings and action.nargs != 0:
                assert f"(default: {action.default})" == shown[action.option_strings[-1]], f"{command}: {action}"
    for options, _ in READ_BY_TYRO.values():
        for name, words in option_words(options).items():
            value = options.__dataclass_fields__[name].default  # type: ignore[attr-defined]
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                assert words.default.startswith(f"(default: {value}"), name


def test_pixels_are_those_of_the_reader() -> None:
    from fastclip.data.picture import USUAL_PIXELS

    assert {line.default for line in LINES if line.name == "--max-pixels"} == {f"(default: {USUAL_PIXELS})"}


def test_reference_lists_all_datasets_with_published_results() -> None:
    from fastclip.cli.pictures import _TOP1
    from fastclip.evaluation.published import _DATASETS

    assert _TOP1 == _DATASETS


def test_same_option_has_the_same_words() -> None:
    words: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for line in LINES:
        if line.name not in {"summary", *ALWAYS_OWN_WORDS}:
            groups = MEANS_SOMETHING_ELSE.get(line.name, {})
            group = next((one for one in groups if line.command in ((one,) if isinstance(one, str) else one)), "")
            words[line.name, str(group)][line.text].append(line.command)
    assert {name: dict(texts) for name, texts in words.items() if len(texts) > 1} == {}


def test_exceptions_are_needed() -> None:
    """Each differs from what the other commands say: an exception that is no longer one is removed."""
    for option, groups in MEANS_SOMETHING_ELSE.items():
        excepted = {command for one in groups for command in ((one,) if isinstance(one, str) else one)}
        texts = {line.command: line.text for line in LINES if line.name == option}
        others = {text for command, text in texts.items() if command not in excepted}
        assert others and all(texts[command] not in others for command in excepted), option
    assert len(MEANS_SOMETHING_ELSE) <= 15


@pytest.mark.parametrize("command", PARSERS, ids=lambda command: command or "fastclip")
def test_examples_parse(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    title, *examples = (PARSERS[command].epilog or "").replace("\\\n", " ").splitlines()
    assert title == "examples:" and 2 <= len(examples) <= 4
    for example in examples:
        words = shlex.split(example.partition(" | ")[0])
        if words[0] == "torchrun":
            words = words[words.index("--no-python") + 1 :]
        assert words[0] == "fastclip" and " ".join(words[1:]).startswith(command), example
        parse(words[1:])


def parse(words: list[str]) -> None:
    """Read the words as ``fastclip`` does, which exits if they are wrong."""
    args, unknown = cli._parser().parse_known_args(words)
    if "--config" in unknown:
        file = Path(unknown[unknown.index("--config") + 1])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{data: digits, model: ViT-tiny, output: runs}")
    if args.command in READ_BY_TYRO:
        READ_BY_TYRO[args.command][1](unknown)
    else:
        assert not unknown, unknown


@pytest.mark.parametrize("words", [["plan", "--batch", "x"], ["train", "--data", "x"], ["bench", "--odd"]])
def test_examples_that_do_not_parse_are_noticed(words: list[str]) -> None:
    with pytest.raises((SystemExit, AssertionError)) as end:
        parse(words)
    assert getattr(end.value, "code", 2) == 2


@pytest.mark.parametrize("command", PARSERS, ids=lambda command: command or "fastclip")
def test_help_is_printed(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The status is 0, every option has its words, prose is wrapped for the terminal, and the examples come last."""
    monkeypatch.setenv("COLUMNS", "90")
    with pytest.raises(SystemExit) as end:
        cli.main([*command.split(), "--help"])
    said = capsys.readouterr()
    epilog = PARSERS[command].epilog
    assert not end.value.code and not said.err and epilog
    prose, _, examples = said.out.rpartition("\nexamples:\n")
    assert f"examples:\n{examples}".strip() == epilog
    together = " ".join(prose.replace("│", " ").split())
    for line in LINES:
        if line.command == command and line.name != "summary":
            assert " ".join(f"{line.text} {line.default}".split()) in together, line.name
    assert "None}" not in together and "(default: None)" not in together
    assert all(len(one) <= 90 for one in prose.splitlines() if one.startswith((" ", "│")))
