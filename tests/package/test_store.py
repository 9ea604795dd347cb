"""The store of the tests' builds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support import ROOT
from support.store import KEPT, sources, stored


def maker(folder: Path) -> Callable[[Path, Path], None]:
    """Return a builder that writes a file, and a line for each of its calls."""

    def make(source: Path, place: Path) -> None:
        with (folder / "calls").open("a") as calls:
            calls.write("called\n")
        assert not [*place.iterdir()]
        (place / "built").write_text((source / "source").read_text().upper())

    return make


def ask(folder: Path, options: object = None) -> Path:
    return stored("thing", [folder / "source"], options, maker(folder), root=folder)


def calls(folder: Path) -> int:
    return len((folder / "calls").read_text().splitlines())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "source").write_text("one")
    return tmp_path


def builds(folder: Path) -> set[Path]:
    return {path for path in (folder / "build" / "stored" / "thing").iterdir() if path.name != "lock"}


def test_second_call_does_not_build(folder: Path) -> None:
    first = ask(folder)
    assert (first / "built").read_text() == "ONE"
    assert ask(folder) == first and calls(folder) == 1


def test_changed_byte_is_another_build(folder: Path) -> None:
    first = ask(folder)
    (folder / "source").write_text("ona")
    second = ask(folder)
    assert second != first and (second / "built").read_text() == "ONA"
    (folder / "source").write_text("one")
    assert ask(folder) == first and calls(folder) == 2


def test_other_options_are_another_build(folder: Path) -> None:
    assert len({ask(folder), ask(folder, "-O3"), ask(folder, "-O2")}) == 3


def test_old_builds_are_removed(folder: Path) -> None:
    places = [ask(folder, number) for number in range(KEPT)]
    for second, place in enumerate(places):  # the file system's clock may give several of them the same time
        os.utime(place, (second, second))
    assert ask(folder, 0) == places[0]  # built first but used last
    (folder / "build" / "stored" / "thing" / "half").mkdir()  # left by a process that was killed
    new = ask(folder, "new")
    assert builds(folder) == {*places[2:], places[0], new}


def test_build_that_raises_leaves_nothing(folder: Path) -> None:
    def fail(source: Path, place: Path) -> None:
        (place / "half").write_text("half of it")
        raise ValueError("the compiler said no")

    for _ in range(2):
        with pytest.raises(ValueError, match="said no"):
            stored("thing", [folder / "source"], None, fail, root=folder)
        assert not builds(folder)
    assert (ask(folder) / "built").is_file()


def test_sources_may_change_meanwhile(folder: Path) -> None:
    """Sources may change during a build: the build uses the original ones, and is stored for them."""

    def make(source: Path, place: Path) -> None:
        (folder / "source").write_text("two")
        (source / "source").rename(place / "built")

    first = stored("thing", [folder / "source"], None, make, root=folder)
    assert (first / "built").read_text() == "one"
    second = stored("thing", [folder / "source"], None, make, root=folder)
    assert second != first and (second / "built").read_text() == "two"


ASK = """
import sys, time
from pathlib import Path
from support import ROOT
from support.store import stored

folder = Path(sys.argv[1])


def make(source, place):
    with (folder / "calls").open("a") as calls:
        calls.write("called\\n")
    (place / "half").touch()
    time.sleep(0.5)
    (place / "built").touch()


(folder / f"ready{sys.argv[2]}").touch()
while len([*folder.glob("ready*")]) < 2:
    time.sleep(0.001)
place = stored("thing", [folder / "source"], None, make, root=folder)
assert (place / "built").exists()
"""


def test_two_processes_at_once_build_once(folder: Path) -> None:
    (folder / "ask.py").write_text(ASK)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, folder / "ask.py", folder]
    processes = [subprocess.Popen([*command, str(k)], env=environment) for k in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert calls(folder) == 1


def test_what_is_built_is_no_source() -> None:
    names = {path.name for path in sources("fastclip", "triton_kernels", "setup.py")}
    assert {"setup.py", "py.typed", "launch.py", "report.html"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build_report.txt"))]
