"""Tests of `once`, which builds a folder for all processes of a run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from support import once as module
from support.once import once
from support.processes import ended, forked, forks


@pytest.fixture(autouse=True)
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "_run", tmp_path)
    return tmp_path


def test_second_call_makes_nothing() -> None:
    first = once("thing", lambda folder: (folder / "made").touch())
    assert once("thing", lambda folder: pytest.fail("made again")) == first and (first / "made").exists()
    assert once("other", lambda folder: None) != first


def test_failure_is_told_to_all_who_ask_later() -> None:
    def fails(folder: Path) -> None:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        once("thing", fails)
    with pytest.raises(pytest.fail.Exception, match=r"'thing' was not made:[^$]*the disk is gone"):
        once("thing", lambda folder: None)


def test_timeout_of_a_test_is_told_too() -> None:
    with pytest.raises(pytest.fail.Exception, match="too long"):
        once("thing", lambda folder: pytest.fail("too long"))
    with pytest.raises(pytest.fail.Exception, match=r"'thing' was not made:[^$]*too long"):
        once("thing", lambda folder: None)


def test_half_of_a_process_that_was_killed_is_removed(run: Path) -> None:
    (run / "once" / "thing").mkdir(parents=True)
    (run / "once" / "thing" / "half").touch()
    assert not [*once("thing", lambda folder: None).iterdir()]


@forks
def test_processes_that_ask_at_the_same_time_wait_for_one(run: Path) -> None:
    def make(folder: Path) -> None:
        with (run / "calls").open("a") as calls:
            calls.write("called\n")
        time.sleep(0.2)
        (folder / "made").touch()

    def asks() -> None:
        assert (once("thing", make) / "made").exists()

    assert [ended(pid) for pid in [forked(asks) for _ in range(4)]] == [0] * 4
    assert (run / "calls").read_text() == "called\n"
