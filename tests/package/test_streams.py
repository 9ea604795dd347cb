"""Commands whose stdout is closed or lacks characters, and the text of their errors."""

from __future__ import annotations

import ast
import io
import logging
import os
import pickle
import re
import sqlite3
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fastclip.cli import main, models
from fastclip.cli.ending import message_of
from fastclip.cli.printing import prepare_streams
from support import ROOT
from support.faulty import write_folder
from support.processes import ended, forked, forks


def stream(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding)


@pytest.mark.fault(
    "The encoding of the terminal lacks a character", "The character is escaped, and everything else is printed"
)
@pytest.mark.parametrize(
    ("encoding", "printed"),
    [("latin-1", b"Gr\xfc\xdfe \\u2026 \xff\n"), ("ascii", b"Gr\\xfc\\xdfe \\u2026 \xff\n")],
)
def test_what_an_encoding_lacks_is_escaped(encoding: str, printed: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", stream(encoding))
    monkeypatch.setattr(sys, "stderr", stream(encoding))
    prepare_streams()
    for out in (sys.stdout, sys.stderr):
        print("Grüße … " + os.fsdecode(b"\xff"), file=out, flush=True)
        assert out.buffer.getvalue() == printed  # type: ignore[attr-defined]


ODD = "o\x1b[33mY\x9b.\u202e"


def plain(text: str) -> bool:
    return all(line.isprintable() for line in text.splitlines())


@pytest.mark.fault("A name in an error or in the log contains escape sequences or line ends", "They are escaped")
def test_errors_and_the_log_cannot_move_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])  # as in the command's own process
    folder = tmp_path / f"{ODD}\nfastclip: all is well"
    (folder / "a").mkdir(parents=True)
    (folder / "more").symlink_to(tmp_path)
    (folder / "x.png").touch()
    assert main(["data", "check", str(folder)]) == 1
    said = capsys.readouterr().err
    assert plain(said) and said.startswith("fastclip: ") and said.count("o\\E[33mY\\302\\233.\\342\\200\\256") >= 2
    assert "\\nfastclip: all is well: 1 links to folders are not followed" in said
    logging.getLogger("fastclip").error("a\nb", exc_info=ValueError(ODD))
    first, *rest = capsys.readouterr().err.splitlines()
    assert first == "fastclip: a\\nb" and rest[-1].startswith("ValueError: o\\E[33mY")


def test_results_cannot_move_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    write_folder(tmp_path / "data", 2)
    for terminal in (True, False):
        out = stream("utf-8")
        monkeypatch.setattr(out, "isatty", lambda terminal=terminal: terminal, raising=False)
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["data", "pack", str(tmp_path / "data"), "--output", str(tmp_path / ODD), "--workers", "0"]) == 0
        out.flush()
        printed = out.buffer.getvalue().decode()  # type: ignore[attr-defined]
        assert printed.startswith("wrote ") and plain(printed) == terminal and (ODD in printed) != terminal


def test_names_are_printed_by_the_printing_module_alone() -> None:
    names = re.compile(r"\.(output|folder|spec|target|model|save)\b")  # attributes that contain a path or a user's text
    for file in (ROOT / "fastclip" / "cli").rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Call)]
        bare = [ast.unparse(call) for call in calls if ast.unparse(call.func) == "print"]
        assert not [line for line in bare if names.search(line)], f"{file.name}: say and complain print names"


@forks
@pytest.mark.fault(
    "stdout of a command is closed", "The command works, and its output does not end up in the next file that it opens"
)
def test_closed_stream_is_nobody_elses(tmp_path: Path) -> None:
    def closed() -> None:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.close(number)
            setattr(sys, name, None)
        prepare_streams()
        with (tmp_path / "file").open("w") as file:
            assert file.fileno() > 2
            print("into nothing")
            print("into nothing", file=sys.stderr, flush=True)
            os.write(1, b"of a library")
        assert main(["models"]) == 0
        assert (tmp_path / "file").read_text() == ""

    assert ended(forked(closed, tmp_path / "said")) == 0, (tmp_path / "said").read_text()


def zip_error() -> Exception:
    with pytest.raises(zipfile.BadZipFile) as caught:
        zipfile.ZipFile(io.BytesIO(b"no zip"))
    return caught.value


DAMAGED = "a file is damaged, or is in a different format from what its name suggests"
ARROW_ERROR = type("ArrowException", (Exception,), {"__module__": "pyarrow.lib"})("odd")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("x.csv: no rows"), "x.csv: no rows"),
        (zip_error(), f"{DAMAGED} (BadZipFile: File is not a zip file)"),
        (pickle.UnpicklingError("odd"), f"{DAMAGED} (UnpicklingError: odd)"),
        (ARROW_ERROR, f"{DAMAGED} (ArrowException: odd)"),
        (sqlite3.OperationalError("disk is full"), f"{DAMAGED} .*OperationalError: disk is full"),
        (RecursionError("too deep"), None),
        (MemoryError(), "out of memory: lower --micro-batch; `fastclip plan` predicts what fits"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "out of the GPU's memory: lower --micro-batch"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"),
            "out of memory: lower --micro-batch",
        ),
        (sqlite3.ProgrammingError("of ours"), None),
        (RuntimeError("mat1 and mat2"), None),
        (KeyError("of ours"), None),
        (NotImplementedError("of ours"), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_error_of_the_users_is_a_line_and_ours_a_traceback(
    error: Exception, said: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (message_of(error, "train") is None) == (said is None)
    if said is not None:
        assert re.match(said.replace("(", r"\(").replace(")", r"\)"), message_of(error, "train") or "")

    def fails(args: Any) -> None:
        raise error

    monkeypatch.setattr(models, "_models", fails)
    if said is None:
        with pytest.raises(type(error)):
            main(["models"])
        return
    assert main(["models"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("fastclip models: ") and message.count("\n") == 1
